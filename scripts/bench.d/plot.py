"""Plots of a run, as SVG, by hand: nothing has to be installed for them."""
import math
import re
import statistics
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 80, 24, 64, 56
# Told apart by those who see few colours, too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "7 4", "2 3", "9 3 2 3", "", "7 4")


def short(value):
    """A number on an axis."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"


class Axis:
    """Maps values to a range of pixels."""

    def __init__(self, values, pixels, log=False, ticks=None):
        self.log, self.pixels = log, pixels
        values = [value for value in values if value > 0] if log else list(values)
        low, high = (min(values), max(values)) if values else (1, 10)
        if log:
            self.low, self.high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
            if ticks:
                self.low, self.high = min(*ticks, low), max(*ticks, high)
        else:
            self.low, self.high = min(low, 0), high
        if self.low == self.high:
            self.high = self.low * 10 if log else self.low + 1
        self.ticks = ticks or (self.decades() if log else self.steps())

    def decades(self):
        """Powers of ten."""
        return [10.0 ** power for power in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)]

    def steps(self):
        """Round numbers, about five; the axis grows to the last."""
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        ticks = [self.low]
        while ticks[-1] < self.high - step / 1e6:
            ticks.append(ticks[-1] + step)
        self.high = ticks[-1]
        return ticks

    def at(self, value):
        """The pixel of a value."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        start, end = self.pixels
        return start + share * (end - start)


def chart(title, x_label, y_label, series, log_x=False, log_y=False, x_ticks=None, dots=False):
    """An SVG document with one line a series: (label, [(x, y), ...])."""
    points = [point for _, line in series for point in line]
    x_axis = Axis([x for x, _ in points], (LEFT, WIDTH - RIGHT), log_x, x_ticks)
    y_axis = Axis([y for _, y in points], (HEIGHT - BOTTOM, TOP), log_y)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
           'font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           f'<text x="{LEFT}" y="22" font-size="15" font-weight="bold">{escape(title)}</text>']
    for tick in x_axis.ticks:
        x = x_axis.at(tick)
        out.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(tick)}</text>')
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        out.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>')
    out.append(f'<text transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
               f'text-anchor="middle">{escape(y_label)}</text>')
    legend = LEFT
    for number, (label, line) in enumerate(series):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in line)
        out.append(f'<polyline points="{path}" {style}/>')
        if dots:
            out += [f'<circle cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3.5" fill="{colour}"/>' for x, y in line]
        out.append(f'<line x1="{legend}" y1="42" x2="{legend + 26}" y2="42" {style}/>')
        out.append(f'<text x="{legend + 32}" y="46">{escape(label)}</text>')
        legend += 52 + 7 * len(label)
    return "\n".join(out + ["</svg>", ""])


def find(records, group):
    """The cases of a group."""
    return [record for record in records if record["group"] == group and record.get("sides")]


def median_rate(side):
    """The median rate of a side."""
    return statistics.median(report["iops"] for report in side["reports"])


def depth_plot(records):
    """Read IOPS over the depth of the chain."""
    lines = {}
    for record in find(records, "chain") + find(records, "depth"):
        if "QD32" not in record["case"] or "writes a layer" in record["case"]:
            continue
        for side in record["sides"]:
            found = re.fullmatch(r"(.+) depth (\d+)", side["label"])
            if found:
                # Depth 1 is in both groups, of different volumes; the first counts.
                lines.setdefault(found.group(1), {}).setdefault(int(found.group(2)), median_rate(side))
    if not lines:
        return None
    depths = sorted({depth for line in lines.values() for depth in line})
    return chart("4 KiB random reads at QD32 over the depth of the chain", "layers", "reads a second",
                 [(label, sorted(line.items())) for label, line in lines.items()], log_x=True, log_y=True,
                 x_ticks=depths, dots=True)


def merged_histogram(reports):
    """All rounds together: (nanoseconds, share of the operations in per cent)."""
    merged = {}
    for report in reports:
        for nanoseconds, count in report.get("latency_histogram", ()):
            merged[nanoseconds] = merged.get(nanoseconds, 0) + count
    total = sum(merged.values())
    return [(nanoseconds / 1000, 100 * count / total) for nanoseconds, count in sorted(merged.items())]


def latency_plot(records, case):
    """Latency histograms of all sides of a hot case."""
    for record in find(records, "hot"):
        if record["case"] == case:
            series = [(side["label"], merged_histogram(side["reports"])) for side in record["sides"]]
            return chart(f"Latency, {case}", "microseconds (steps of 10 %)", "% of the operations in the step",
                         [each for each in series if each[1]], log_x=True)
    return None


def timeline_plot(records):
    """Rates over time from a snapshot on."""
    for record in find(records, "timeline"):
        series = []
        for side in record["sides"]:
            timeline = side["reports"][0]["timeline"]
            slice_seconds = timeline["slice_seconds"]
            # The last slice is cut off by the end.
            series.append((side["label"], [(at * slice_seconds, max(count, 1) / slice_seconds)
                                           for at, count in enumerate(timeline["operations"][:-1])]))
        return chart(f"{record['case']}, random over the working set", "seconds since the snapshot", "writes a second",
                     series, log_y=True)
    return None


def draw(records, directory):
    """Writes the plots for which there are figures; returns their paths."""
    plots = {
        "read-over-depth": depth_plot(records),
        "latency-read-qd1": latency_plot(records, "read 4K QD1"),
        "latency-read-qd32": latency_plot(records, "read 4K QD32"),
        "latency-write-qd32": latency_plot(records, "write 4K QD32"),
        "latency-mix-qd32": latency_plot(records, "mix 70/30 4K QD32"),
        "first-write": timeline_plot(records),
    }
    paths = []
    for name, plot in plots.items():
        if plot:
            paths.append(directory / f"{name}.svg")
            paths[-1].write_text(plot, encoding="utf-8")
    return paths
