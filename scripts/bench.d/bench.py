"""Measures stratablk against qemu-storage-daemon in one interleaved run; started by scripts/bench."""
import argparse
import contextlib
import datetime
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time

import host
from backends import Failed, Load, QsdDisk, StratablkStore, make_overlay, remove
from table import Row, Target, render

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CLUSTER = 64 << 10
RAW_QD32 = Target(1.0, "no slower than a plain file at depth")
FIRST_WRITE = Target(2.0, "a first write copies nothing")
# Writes of 4 KiB between two snapshots, where a snapshot saw a few.
FEW_WRITES = 4
DEEP = Target(0.95, "reads cost the same at any depth")


class Scale:
    """How big and how long."""

    def __init__(self, arguments):
        quick = arguments.quick
        self.pairs = arguments.pairs or (1 if quick else 7)
        self.seconds = arguments.seconds or (0.1 if quick else 1.5)
        self.warmup = 0.02 if quick else 0.25
        self.warm_bytes = (16 << 20) if quick else (256 << 20)
        self.base_bytes = (64 << 20) if quick else (2 << 30)
        self.depths = (1, 8, 32)
        self.deep = 20 if quick else 1000
        # Half of the working set lies in the layers, as many clusters as every depth can share out.
        self.layer_clusters = self.warm_bytes // CLUSTER // 2 // self.deep * self.deep

    def room(self):
        """Bytes that the files take at most at one time."""
        return 2 * self.base_bytes + 4 * self.warm_bytes + (1 << 30 if self.pairs > 1 else 0)


class Case:
    """One line of the table: what is run against which two disks."""

    def __init__(self, name, load, unit="op/s", target=None, before=None, until_done=False):
        """`before(side)` prepares a run and returns the disk; without it the disks of the group are used."""
        self.name, self.load, self.unit, self.target = name, load, unit, target
        self.before, self.until_done = before, until_done


class Bench:
    """One run of the whole."""

    def __init__(self, arguments, work):
        self.arguments, self.work = arguments, work
        self.scale = Scale(arguments)
        bin_dir = pathlib.Path(arguments.bin_dir or ROOT / "target" / "release").resolve()
        self.stratablk = bin_dir / "stratablk"
        self.load = Load(bin_dir / "stratablk-load", arguments.load_cpu, arguments.seed)
        self.rows, self.records = [], []
        self.layout_seed = arguments.seed + 1000
        self.base = work / "base.raw"

    # -- preparing disks

    def make_base(self):
        """A raw image full of data, the base of all chains."""
        if self.base.exists():
            return
        piece = bytearray(os.urandom(1 << 20))
        with open(self.base, "wb") as base:
            for number in range(self.scale.base_bytes >> 20):
                piece[:8] = number.to_bytes(8, "little")
                base.write(piece)

    def fill(self, disk):
        """Writes the working set once, so that no measured write is a first one."""
        self.load.run(disk, "--fill", "--block", "128K", "--depth", 8, "--working-set", self.scale.warm_bytes)

    def warm(self, disk):
        """Reads the working set once."""
        count = self.scale.warm_bytes >> 17
        self.load.run(disk, "--rw", "read", "--pattern", "seq", "--block", "128K", "--depth", 8,
                      "--working-set", self.scale.warm_bytes, "--count", count)

    def write_layer(self, disk, layer, unit, count):
        """Writes what a layer owns: `count` scattered units, none that another layer owns. Which ones depends on the
        layer alone, so `depth` layers of `count` units hold the same as one of `depth * count`, in every back-end."""
        self.load.run(disk, "--rw", "write", "--pattern", "once", "--block", unit, "--stride", unit,
                      "--working-set", self.scale.warm_bytes, "--skip", layer * count, "--count", count,
                      "--depth", 1, seed=self.layout_seed)

    def qsd_raw(self, name):
        """A preallocated raw file behind qemu-storage-daemon."""
        path = self.work / f"{name}.raw"
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.scale.warm_bytes)
        return QsdDisk(self.work, name, self.arguments.server_cpu, [path], ["raw"], "qsd raw")

    def qsd_chain(self, name, depth):
        """A chain of `depth` qcow2 files over the base, each with clusters of its own."""
        layers, formats = [self.base], ["raw"]
        for layer in range(depth):
            path = self.work / f"{name}.{layer}.qcow2"
            make_overlay(path, layers[-1], formats[-1], extended=False)
            layers.append(path)
            formats.append("qcow2")
            disk = QsdDisk(self.work, name, self.arguments.server_cpu, layers, formats, f"qcow2 depth {depth}")
            with contextlib.ExitStack() as stack:
                stack.callback(disk.stop)
                self.write_layer(disk, layer, CLUSTER, self.scale.layer_clusters // depth)
                if layer == depth - 1:
                    # The whole chain is there: it stays up for the caller.
                    stack.pop_all()
        return disk, layers[1:]

    def stratablk_chain(self, store, name, depth, unit=CLUSTER, units=None):
        """A volume over the base with `depth` layers that own `units` together (clusters over half of the working set, if
        nothing is said), made by taking snapshots."""
        disk = store.disk(name, f"stratablk depth {depth}", base=self.base)
        for layer in range(depth):
            if layer:
                disk.snapshot()
            self.write_layer(disk, layer, unit, (units or self.scale.layer_clusters) // depth)
        return disk

    # -- measuring

    def measure(self, group, case, disks, servers):
        """All pairs of one case; the side that goes first changes from pair to pair."""
        rates, reports = ([], []), ([], [])
        watch = host.Watch([disk.pid for disk in disks] + servers)
        watch.start()
        for pair in range(self.scale.pairs):
            for side in ((0, 1) if pair % 2 == 0 else (1, 0)):
                disk = case.before(side) if case.before else disks[side]
                timing = [] if case.until_done else ["--warmup", self.scale.warmup, "--seconds", self.scale.seconds]
                if case.before:
                    watch.pids.add(disk.pid)
                report = self.load.run(disk, *case.load, *timing, seed=self.arguments.seed + pair)
                reports[side].append(report)
                rates[side].append(report["bytes_per_second"] if case.unit == "B/s" else report["iops"])
        others, steal = watch.stop()
        # Figures that mean nothing are not judged.
        judged = not (self.arguments.quick or self.arguments.self_check)
        row = Row(case.name, disks[0].label, disks[1].label, case.unit, case.target if judged else None, *rates)
        disturbed = host.why_busy(others, steal, 0, os.cpu_count())
        self.rows.append(row)
        self.records.append({
            "group": group, "case": case.name, "a": row.a, "b": row.b, "unit": case.unit,
            "load": [str(argument) for argument in case.load], "ratios": row.ratios(), "ratio_median": row.median(),
            "target": row.target and row.target.ratio, "verdict": row.verdict(), "others_share": others,
            "steal_share": steal, "disturbed": disturbed, "a_reports": reports[0], "b_reports": reports[1],
        })
        mark = f"  DISTURBED: {'; '.join(disturbed)}" if disturbed else ""
        print(f"  {case.name}: {row.a} / {row.b} = {row.median():.2f} {row.verdict()}{mark}", flush=True)

    def random(self, operation, depth):
        """Arguments for 4 KiB at random."""
        return ["--rw", operation, "--depth", depth, "--working-set", self.scale.warm_bytes]

    # -- groups of cases that share their disks

    def group_raw(self, stack):
        """A volume without snapshots against a raw file; everything warm and preallocated."""
        if self.arguments.self_check:
            ours = self.qsd_raw("self")
        else:
            store = StratablkStore(self.work, "flat", self.arguments.server_cpu, self.stratablk)
            stack.callback(store.stop)
            ours = store.disk("flat", "stratablk", size=self.scale.warm_bytes)
        stack.callback(ours.stop)
        theirs = self.qsd_raw("raw")
        stack.callback(theirs.stop)
        for disk in (ours, theirs):
            self.fill(disk)
            self.warm(disk)
        large = ["--rw", "read", "--block", "128K", "--depth", 8, "--working-set", self.scale.warm_bytes]
        for case in (
            Case("read 4K QD1", self.random("read", 1)),
            Case("read 4K QD32", self.random("read", 32), target=RAW_QD32),
            Case("write 4K QD1", self.random("write", 1)),
            Case("write 4K QD32", self.random("write", 32), target=RAW_QD32),
            Case("read 128K QD8", large, unit="B/s"),
            Case("write+flush 4K QD1", self.random("writeflush", 1)),
        ):
            self.measure("raw", case, (ours, theirs), [])

    def group_chain(self, stack):
        """Chains of the same depth, layers owning the same clusters."""
        self.make_base()
        for depth in self.scale.depths:
            with contextlib.ExitStack() as inner:
                if self.arguments.self_check:
                    ours, files = self.qsd_chain(f"self{depth}", depth)
                    inner.callback(remove, *files)
                else:
                    store = StratablkStore(self.work, f"chain{depth}", self.arguments.server_cpu, self.stratablk)
                    inner.callback(store.stop)
                    ours = self.stratablk_chain(store, "chain", depth)
                inner.callback(ours.stop)
                theirs, files = self.qsd_chain(f"chain{depth}", depth)
                inner.callback(remove, *files)
                inner.callback(theirs.stop)
                for disk in (ours, theirs):
                    self.warm(disk)
                for queue_depth in (1, 32):
                    case = Case(f"read 4K QD{queue_depth}, depth {depth}", self.random("read", queue_depth))
                    self.measure("chain", case, (ours, theirs), [])

    def group_first_write(self, stack):
        """4 KiB writes, one in each 64 KiB, each the first since a snapshot; over a base full of data."""
        self.make_base()
        if self.arguments.self_check:
            ours = None
        else:
            store = StratablkStore(self.work, "first", self.arguments.server_cpu, self.stratablk)
            stack.callback(store.stop)
            ours = store.disk("first", "stratablk", base=self.base)
        for extended in (False, True):
            label = "qcow2 128K extended L2" if extended else "qcow2 64K"
            for queue_depth in (1, 32):
                with contextlib.ExitStack() as inner:
                    fresh = FreshOverlay(self, extended, label)
                    inner.callback(fresh.discard)

                    def before(side, fresh=fresh):
                        if side == 0 and ours:
                            fresh.discard()
                            ours.snapshot()
                            return ours
                        return fresh.make()

                    case = Case(f"first write 4K QD{queue_depth}",
                                ["--rw", "write", "--pattern", "once", "--stride", CLUSTER, "--depth", queue_depth,
                                 "--working-set", self.scale.base_bytes],
                                target=None if extended else FIRST_WRITE, before=before, until_done=True)
                    self.measure("first-write", case, (ours or fresh, fresh), [])

    def group_depth(self, stack):
        """The same data at depth 1 and at depth 1,000, both in stratablk."""
        if self.arguments.self_check:
            print("  (has no qemu-storage-daemon side)")
            return
        self.make_base()
        store = StratablkStore(self.work, "depth", self.arguments.server_cpu, self.stratablk)
        stack.callback(store.stop)
        # The usual case, where each snapshot saw a few writes, and the harsh one, where every second read goes to
        # another of a thousand files.
        few = FEW_WRITES * self.scale.deep
        for what, layout in ((f"{FEW_WRITES} writes a layer", {"unit": 4096, "units": few}), ("half in the layers", {})):
            name = what.replace(" ", "-")
            shallow = self.stratablk_chain(store, f"shallow-{name}", 1, **layout)
            began = time.monotonic()
            deep = self.stratablk_chain(store, f"deep-{name}", self.scale.deep, **layout)
            print(f"  took {self.scale.deep - 1} snapshots in {time.monotonic() - began:.1f} s", flush=True)
            for disk in (deep, shallow):
                self.warm(disk)
            for queue_depth in (1, 32):
                case = Case(f"read 4K QD{queue_depth}, {what}", self.random("read", queue_depth), target=DEEP)
                self.measure("depth", case, (deep, shallow), [])

    def groups(self):
        """The groups by name, in order."""
        return {
            "raw": self.group_raw,
            "first-write": self.group_first_write,
            "depth": self.group_depth,
            "chain": self.group_chain,
        }


class FreshOverlay:
    """A qcow2 file over the base, made anew for every run."""

    def __init__(self, bench, extended, label):
        self.bench, self.extended, self.label = bench, extended, label
        self.path = bench.work / "fresh.qcow2"
        self.disk = None
        self.pid = os.getpid()

    def make(self):
        """A new one, served."""
        self.discard()
        make_overlay(self.path, self.bench.base, "raw", self.extended)
        self.disk = QsdDisk(self.bench.work, "fresh", self.bench.arguments.server_cpu, [self.bench.base, self.path],
                            ["raw", "qcow2"], self.label)
        return self.disk

    def discard(self):
        """Ends and removes the last one."""
        if self.disk:
            self.disk.stop()
            self.disk = None
        remove(self.path)


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--pairs", type=int, help="pairs of runs a case (7)")
    parser.add_argument("--seconds", type=float, help="length of a run (1.5)")
    parser.add_argument("--quick", "--smoke", action="store_true",
                        help="every case once and briefly, on any machine; the figures mean nothing and are not judged")
    parser.add_argument("--only", metavar="GROUP", action="append", help="only this group of cases (see --list)")
    parser.add_argument("--list", action="store_true", help="show the groups and stop")
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("/dev/shm"),
                        help="where the disks are kept meanwhile (/dev/shm)")
    parser.add_argument("--bin-dir", type=pathlib.Path, help="programs that are there already, instead of building")
    parser.add_argument("--load-cpu", type=int, default=0, help="the load generator's CPU (0)")
    parser.add_argument("--server-cpu", type=int, default=1, help="the back-ends' CPU (1)")
    parser.add_argument("--seed", type=int, default=1, help="everything random follows from it (1)")
    parser.add_argument("--force", action="store_true", help="measure although the machine is busy")
    parser.add_argument("--strict", action="store_true", help="exit 4 if a target is missed")
    parser.add_argument("--self-check", action="store_true",
                        help="qemu-storage-daemon on both sides: every ratio should be close to 1")
    return parser.parse_args()


def busy(arguments):
    """Why this machine is not fit to measure on now."""
    watch = host.Watch([])
    watch.start()
    heaviest = host.heaviest(seconds=0.1 if arguments.quick else 2.0)
    others, steal = watch.stop()
    reasons = host.why_busy(others, steal, os.getloadavg()[0], os.cpu_count())
    for cpu in (arguments.load_cpu, arguments.server_cpu):
        if cpu not in os.sched_getaffinity(0):
            raise Failed(f"there is no CPU {cpu}; choose with --load-cpu and --server-cpu")
    if arguments.load_cpu == arguments.server_cpu:
        reasons.append("load and back-end share one CPU")
    if reasons:
        reasons += [f"process {pid} ({name}) uses {share:.0%} of a CPU" for share, pid, name in heaviest if share > 0.02]
    return reasons


def main():
    """Everything; returns the exit code."""
    arguments = parse_arguments()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        work = pathlib.Path(tempfile.mkdtemp(prefix="stratablk-bench.", dir=arguments.dir))
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        bench = Bench(arguments, work)
        names = list(bench.groups())
        if arguments.list:
            print("\n".join(f"{name:12}  {group.__doc__}" for name, group in bench.groups().items()))
            return 0
        unknown = set(arguments.only or ()) - set(names)
        if unknown:
            print(f"scripts/bench: no group named {', '.join(sorted(unknown))}; --list shows them", file=sys.stderr)
            return 2
        free = shutil.disk_usage(work).free
        if free < bench.scale.room():
            print(f"scripts/bench: {arguments.dir} has {free >> 20} MiB, {bench.scale.room() >> 20} are needed; "
                  "choose another place with --dir", file=sys.stderr)
            return 1
        environment = host.environment(ROOT)
        print("\n".join(f"{key}: {value}" for key, value in environment.items()))
        print(f"seed: {arguments.seed}; {bench.scale.pairs} pairs of {bench.scale.seconds:g} s; disks in {work}; "
              f"load on CPU {arguments.load_cpu}, back-ends on CPU {arguments.server_cpu}")
        reasons = busy(arguments)
        if reasons and not arguments.quick:
            print("scripts/bench: this machine is busy, so the figures would mean nothing:", file=sys.stderr)
            print("\n".join(f"  {reason}" for reason in reasons), file=sys.stderr)
            if not arguments.force:
                print("Try again when it is idle, or give --force.", file=sys.stderr)
                return 3
        began = time.monotonic()
        for name, group in bench.groups().items():
            if not arguments.only or name in arguments.only:
                print(f"{name}: {re.sub(' +', ' ', group.__doc__)}", flush=True)
                with contextlib.ExitStack() as inner:
                    group(inner)
        quotable = not (reasons or arguments.quick or arguments.self_check
                        or any(record["disturbed"] for record in bench.records))
        print(f"\n{render(bench.rows)}\n")
        print(f"A/B: the median over {bench.scale.pairs} pairs of the ratio within each pair; "
              f"{time.monotonic() - began:.0f} s; seed {arguments.seed}.")
        if not quotable:
            print("NOT TO BE QUOTED: " + ("; ".join(reasons) or "a quick, checking or disturbed run") + ".")
        save(bench, environment, quotable, reasons)
        missed = [row for row in bench.rows if row.verdict() == "BELOW"]
        return 4 if arguments.strict and missed else 0
    return 130


def save(bench, environment, quotable, reasons):
    """Keeps every figure in target/bench."""
    directory = ROOT / "target" / "bench"
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H-%M-%SZ")
    path = directory / f"{now}.json"
    path.write_text(json.dumps({
        "time": now, "command": sys.argv, "environment": environment, "quotable": quotable, "busy": reasons,
        "pairs": bench.scale.pairs, "seconds": bench.scale.seconds, "seed": bench.arguments.seed,
        "cases": bench.records,
    }, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(path, directory / "latest.json")
    print(f"All figures: {path}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        print(f"scripts/bench: {error}", file=sys.stderr)
        sys.exit(1)
