"""How a case is measured: sides that take turns, what is noted of each run, and the rows that follow."""
import dataclasses
import pathlib
import shutil
import subprocess
import tempfile

import host
import probes
from backends import Failed, Load, Server
from table import RATIO, VALUE, Row, Target

IOPS, BYTES, P50, MEAN = "iops", "bytes_per_second", "latency_ns_p50", "latency_ns_mean"
UNITS = {IOPS: "op/s", BYTES: "B/s", P50: "ns p50", MEAN: "ns mean", "gap_ns_max": "ns"}


class Scale:
    """How big and how long."""

    def __init__(self, arguments):
        quick = arguments.quick
        self.quick = quick
        self.pairs = arguments.pairs or (1 if quick else 7)
        self.seconds = arguments.seconds or (0.1 if quick else 0.7)
        self.warmup = 0.02 if quick else 0.2
        self.warm_bytes = (16 << 20) if quick else (256 << 20)
        self.base_bytes = (64 << 20) if quick else (2 << 30)
        self.cold_bytes = (64 << 20) if quick else (4 << 30)
        self.depths = (1, 8, 32)
        self.deep = 20 if quick else 1000
        self.snapshots = 5 if quick else 100
        self.idle_seconds = 0.5 if quick else 10
        self.cache_bytes = (128 << 20) if quick else (1 << 30)
        self.dirty_bytes = self.cache_bytes // 2

    def room(self):
        """Bytes that the files in memory take at most at one time."""
        return 2 * self.base_bytes + 4 * self.warm_bytes + 2 * self.cache_bytes + (1 << 30 if self.pairs > 1 else 0)


@dataclasses.dataclass
class Side:
    """Something that is measured."""

    label: str
    # Called with the number of the round; returns a report.
    run: object
    # Whose memory and system calls are of interest; called, since it may be another one each time.
    pid: object = None
    # As `run`, but of no interest but for the system calls that it makes.
    again: object = None
    # The side after which it always runs, since it goes on with what that one left; None: it takes its turn.
    follows: int | None = None


@dataclasses.dataclass
class Compare:
    """One row that follows from a case: side `a` against side `b` (a side without another: its value alone)."""

    a: int
    b: int | None
    target: Target | None = None
    metric: str = IOPS
    kind: str = RATIO
    name: str = ""
    unit: str = ""


def turns(sides, pair):
    """The order in which sides run in a round: another one first each time, those that follow one right after it."""
    leaders = [at for at, side in enumerate(sides) if side.follows is None]
    first = pair % len(leaders)
    for leader in leaders[first:] + leaders[:first]:
        yield leader
        yield from (at for at, side in enumerate(sides) if side.follows == leader)


def with_cpu(report):
    """A report that says what an operation costs the back-end in CPU time, where it knows."""
    if report.get("server_user_seconds") is not None and report["operations"]:
        seconds = report["server_user_seconds"] + report["server_system_seconds"]
        report["server_cpu_ns_per_operation"] = seconds * 1e9 / report["operations"]
    return report


class Bench:
    """One run of the whole: its settings and its results."""

    def __init__(self, arguments, work, root):
        self.arguments, self.work, self.root = arguments, work, root
        self.scale = Scale(arguments)
        self.bin_dir = pathlib.Path(arguments.bin_dir or root / "target" / "release").resolve()
        self.stratablk = self.bin_dir / "stratablk"
        self.load = Load(self.bin_dir / "stratablk-load", arguments.load_cpu, arguments.seed)
        self.rows, self.records, self.notes = [], [], []
        self.on_disk = None

    def disk_dir(self):
        """A directory of this run on a real disk."""
        if not self.on_disk:
            self.arguments.disk_dir.mkdir(parents=True, exist_ok=True)
            self.on_disk = pathlib.Path(tempfile.mkdtemp(prefix="stratablk-bench.", dir=self.arguments.disk_dir.resolve()))
            if host.is_memory(self.on_disk):
                self.note(f"{self.arguments.disk_dir} is no disk: what is measured there says nothing about disks")
        return self.on_disk

    def clean(self):
        """Removes what was put on the disk."""
        if self.on_disk:
            shutil.rmtree(self.on_disk, ignore_errors=True)

    @property
    def judged(self):
        """Whether figures are held against targets."""
        return not (self.arguments.quick or self.arguments.self_check)

    def note(self, text):
        """Something that readers of the table must know."""
        if text not in self.notes:
            self.notes.append(text)
            print(f"  NOTE: {text}", flush=True)

    def load_side(self, disk, *load, until_done=False, label=None):
        """A side that puts this load on a disk."""
        timing = [] if until_done else ["--warmup", self.scale.warmup, "--seconds", self.scale.seconds]

        def run(pair):
            return self.load.run(disk, *load, *timing, seed=self.arguments.seed + pair)

        return Side(label or disk.label, run, lambda: disk.pid, None if until_done else run)

    def measure(self, group, name, sides, compare, load=()):
        """All rounds of one case: in each, every side runs once; another one goes first each time."""
        reports = [[] for _ in sides]
        memory = [0] * len(sides)
        watch = host.Watch(Server.live)
        watch.start()
        for pair in range(self.scale.pairs):
            for at in turns(sides, pair):
                reports[at].append(with_cpu(sides[at].run(pair)))
                if sides[at].pid:
                    memory[at] = max(memory[at], probes.resident_bytes(sides[at].pid()))
        others, steal = watch.stop()
        disturbed = host.why_busy(others, steal, 0, watch.cpus)
        syscalls = [self.count_syscalls(side) for side in sides]
        rows = [self.row(group, name, sides, reports, each) for each in compare]
        self.records.append({
            "group": group, "case": name, "load": [str(part) for part in load], "others_share": others,
            "steal_share": steal, "disturbed": disturbed,
            "sides": [{"label": side.label, "resident_bytes": memory[at], "syscalls_per_operation": syscalls[at],
                       "reports": reports[at]} for at, side in enumerate(sides)],
            "rows": [self.row_record(row) for row in rows],
        })
        self.show(rows, disturbed)
        return reports

    def row(self, group, name, sides, reports, each):
        """The row of a comparison."""
        def values(side):
            return [report[each.metric] for report in reports[side]]

        unit = each.unit or UNITS.get(each.metric, each.metric)
        alone = each.b is None
        return Row(each.name or name, sides[each.a].label, "" if alone else sides[each.b].label, unit,
                   each.target if self.judged else None, values(each.a), [] if alone else values(each.b),
                   VALUE if alone else each.kind, group)

    def record_value(self, group, name, label, unit, values, target=None, **more):
        """A figure that stands alone."""
        row = Row(name, label, "", unit, target if self.judged else None, list(values), [], VALUE, group)
        self.records.append({"group": group, "case": name, "disturbed": [], "rows": [self.row_record(row)], **more})
        self.show([row], [])

    def show(self, rows, disturbed):
        """One line a row, while the rest is still being measured."""
        for row in rows:
            self.rows.append(row)
            against = f" / {row.b}" if row.b else ""
            mark = f"  DISTURBED: {'; '.join(disturbed)}" if disturbed else ""
            target = f" {row.verdict()} ({row.target})" if row.target else ""
            print(f"  {row.name} [{row.unit}]: {row.a}{against} = {row.median():.4g}{target}{mark}", flush=True)

    @staticmethod
    def row_record(row):
        """A row for the JSON document."""
        return {"name": row.name, "a": row.a, "b": row.b, "unit": row.unit, "kind": row.kind, "outcomes": row.outcomes(),
                "median": row.median(), "target": row.target and str(row.target), "why": row.target and row.target.why,
                "verdict": row.verdict()}

    def count_syscalls(self, side):
        """System calls that a side makes for each operation, in one more run; None if nothing can count them."""
        if not side.again:
            return None
        try:
            with probes.Syscalls(side.pid()) as counter:
                report = side.again(self.scale.pairs)
        except (OSError, Failed, subprocess.SubprocessError) as error:
            self.note(f"system calls were not counted: {error}")
            return None
        if counter.total is None:
            self.note("system calls were not counted: neither perf nor strace can do it here")
            return None
        # What was made during the warm-up counts as well, so do its operations.
        operations = report["iops"] * (self.scale.warmup + report["seconds"])
        return counter.total / operations if operations else None
