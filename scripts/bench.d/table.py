"""Measurements next to each other, how they compare, and the table that shows it. Pure: no processes, no files."""
import dataclasses
import statistics

RATIO, DIFFERENCE, VALUE = "ratio", "difference", "value"
SIGNS = {RATIO: "A/B", DIFFERENCE: "A-B", VALUE: "A"}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a case must reach: at least `bound`, or at most."""

    bound: float
    why: str
    at_most: bool = False

    def is_met(self, value):
        """Whether `value` is good enough."""
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self):
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"


@dataclasses.dataclass
class Row:
    """One line: what was compared, and the figures of each round."""

    name: str
    a: str
    b: str
    unit: str
    target: Target | None
    a_values: list
    b_values: list
    # How the two figures of a round become one: their ratio, their difference, or A alone.
    kind: str = RATIO
    group: str = ""

    def outcomes(self):
        """One outcome a round: only figures measured next to each other are compared."""
        if self.kind == VALUE:
            return list(self.a_values)
        if self.kind == DIFFERENCE:
            return [a - b for a, b in zip(self.a_values, self.b_values)]
        return [a / b if b else float("inf") for a, b in zip(self.a_values, self.b_values)]

    def median(self):
        """The median of the outcomes."""
        return statistics.median(self.outcomes())

    def verdict(self):
        """PASS, BELOW, ABOVE, or nothing if there is no target."""
        if self.target is None:
            return ""
        if self.target.is_met(self.median()):
            return "PASS"
        return "ABOVE" if self.target.at_most else "BELOW"

    def is_missed(self):
        """Whether there is a target and it is not met."""
        return self.verdict() not in ("", "PASS")


def number(value):
    """A figure in at most five or six characters."""
    if value < 0:
        return "-" + number(-value)
    for limit, divisor, suffix in ((1e4, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if value < limit:
            scaled = value / divisor
            if suffix == "" and scaled < 10 and scaled != int(scaled):
                return f"{scaled:.3g}"
            return (f"{scaled:.0f}" if scaled >= 100 or suffix == "" else f"{scaled:.1f}") + suffix
    return f"{value / 1e9:.1f}G"


def outcome(value, kind):
    """A ratio with two digits, anything else as a figure."""
    return f"{value:.2f}" if kind == RATIO else number(value)


HEAD = ("case", "A", "B", "outcome", "min..max", "A median", "B median", "unit", "target", "verdict")


def cells(row):
    """The cells of a row, in the order of the head."""
    outcomes = row.outcomes()
    b_median = "" if row.kind == VALUE else number(statistics.median(row.b_values))
    return (row.name, row.a, row.b, f"{SIGNS[row.kind]} {outcome(row.median(), row.kind)}",
            f"{outcome(min(outcomes), row.kind)}..{outcome(max(outcomes), row.kind)}",
            number(statistics.median(row.a_values)), b_median, row.unit, str(row.target or ""), row.verdict())


def render(rows):
    """The table, as text; groups are apart."""
    body = [(row.group, cells(row)) for row in rows]
    widths = [max(len(line[column]) for line in [HEAD, *(line for _, line in body)]) for column in range(len(HEAD))]
    right = {3, 4, 5, 6}

    def line(parts):
        padded = (part.rjust(width) if column in right else part.ljust(width)
                  for column, (part, width) in enumerate(zip(parts, widths)))
        return "  ".join(padded).rstrip()

    lines = [line(HEAD)]
    group = None
    for name, parts in body:
        if name != group:
            lines.append(line(["-" * width for width in widths]))
            group = name
        lines.append(line(parts))
    return "\n".join(lines)


def render_markdown(rows):
    """The table for a document."""
    head = ["case", "A / B", "outcome", "min..max", "A", "B", "unit", "target", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        name, a, b, result, spread, a_median, b_median, unit, target, verdict = cells(row)
        against = f"{a} / {b}" if b else a
        shown = f"**{verdict}**" if row.is_missed() else verdict
        lines.append("| " + " | ".join([name, against, result, spread, a_median, b_median, unit, target, shown]) + " |")
    return "\n".join(lines)
