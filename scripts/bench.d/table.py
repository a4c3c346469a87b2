"""Pairs of measurements, their ratios, and the table that shows them. Pure: no processes, no files."""
import dataclasses
import statistics


@dataclasses.dataclass
class Target:
    """What a case must reach."""

    ratio: float
    why: str


@dataclasses.dataclass
class Row:
    """One case: what was compared, and the rates of each pair."""

    name: str
    a: str
    b: str
    unit: str
    target: Target | None
    a_rates: list
    b_rates: list

    def ratios(self):
        """One ratio a pair: only figures measured next to each other are compared."""
        return [a / b for a, b in zip(self.a_rates, self.b_rates)]

    def median(self):
        """The median of the ratios."""
        return statistics.median(self.ratios())

    def verdict(self):
        """PASS, BELOW or nothing if there is no target."""
        if self.target is None:
            return ""
        return "PASS" if self.median() >= self.target.ratio else "BELOW"


def number(value):
    """A rate in at most five characters."""
    for limit, divisor, suffix in ((1e4, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if value < limit:
            scaled = value / divisor
            return (f"{scaled:.0f}" if scaled >= 100 or suffix == "" else f"{scaled:.1f}") + suffix
    return f"{value / 1e9:.1f}G"


def render(rows):
    """The table, as text."""
    head = ("case", "A", "B", "A/B", "min..max", "A median", "B median", "unit", "target")
    body = []
    for row in rows:
        ratios = row.ratios()
        target = f"{row.verdict()} (>= {row.target.ratio:g})" if row.target else ""
        body.append((row.name, row.a, row.b, f"{row.median():.2f}", f"{min(ratios):.2f}..{max(ratios):.2f}",
                     number(statistics.median(row.a_rates)), number(statistics.median(row.b_rates)), row.unit, target))
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    right = {3, 4, 5, 6}

    def line(cells):
        padded = (cell.rjust(width) if column in right else cell.ljust(width)
                  for column, (cell, width) in enumerate(zip(cells, widths)))
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, body)])
