"""What a snapshot costs: while it is taken under load, in bytes that are written after it, and over time."""
import contextlib
import json
import shutil
import threading

import probes
from backends import Failed
from hot import at_most, fill, open_store, random
from layers import CLUSTER, FreshOverlay, make_base
from measure import Compare, Side
from table import DIFFERENCE

# From one snapshot to the next.
PERIOD_SECONDS = 0.02
NO_STALL = at_most(2e6, "a snapshot is an exchange of a pointer for those who work")
FEW_BYTES = at_most(1.1, "data, and next to nothing beside it")
# Each snapshot's layer may grow to this while snapshots are taken under load.
GAP_BYTES = 16 << 20
# Completions are counted in slices of this length for the plot.
SLICE_SECONDS = 0.01


class Snapshots(threading.Thread):
    """Takes snapshots one after the other while the load runs."""

    def __init__(self, store, volume, count, prefix):
        super().__init__(daemon=True)
        self.store, self.volume, self.count, self.prefix = store, volume, count, prefix
        self.elapsed, self.stalls, self.error = [], [], None
        self.leave = threading.Event()

    def run(self):
        """Until all were taken, or until it is to leave."""
        try:
            for number in range(self.count):
                if self.leave.wait(PERIOD_SECONDS):
                    return
                body = {"name": f"{self.prefix}{number}", "volumes": [self.volume]}
                report = json.loads(self.store.ask("POST", "/v1/snapshots", body))
                self.elapsed.append(report["elapsed_ns"])
                self.stalls.append(report["stall_max_ns"])
        except (Failed, OSError, ValueError, KeyError) as error:
            self.error = error


def group_gap(bench, stack):
    """The longest time without a completion while snapshots are taken under load, beyond that of the load alone."""
    if bench.arguments.self_check:
        return
    # The load sleeps while it waits and the daemon may use both CPUs, so that there is room for the threads that take the
    # snapshots: what is of interest is whether they hold up requests, not how the kernel shares out a busy CPU.
    cpus = f"{bench.arguments.load_cpu},{bench.arguments.server_cpu}"
    seconds = bench.scale.snapshots * PERIOD_SECONDS * 1.25 + 0.1
    load = ["--sleep", "--rw", "mix", "--depth", 4, "--working-set", GAP_BYTES, "--warmup", bench.scale.warmup,
            "--seconds", seconds]
    disks = {}
    inner = stack.enter_context(contextlib.ExitStack())

    def volume(pair):
        """A new one for each round, which both sides share; the last one's store goes, since its layers have grown."""
        if pair not in disks:
            inner.close()
            store = open_store(bench, inner, f"gap{pair}", cpus=cpus)
            inner.callback(shutil.rmtree, store.store, ignore_errors=True)
            # First to be undone: the daemon has to end before its files go.
            inner.callback(store.stop)
            disks[pair] = store.disk("gap", "stratablk", size=bench.scale.warm_bytes)
            fill(bench, disks[pair])
        return disks[pair]

    def alone(pair):
        return bench.load.run(volume(pair), *load, seed=bench.arguments.seed + pair)

    def with_snapshots(pair):
        disk = volume(pair)
        snapshots = Snapshots(disk.store, disk.name, bench.scale.snapshots, "gap")
        snapshots.start()
        try:
            report = bench.load.run(disk, *load, seed=bench.arguments.seed + pair)
        finally:
            snapshots.leave.set()
            snapshots.join()
        if snapshots.error:
            raise Failed(f"a snapshot under load: {snapshots.error}")
        report.update(snapshots=len(snapshots.elapsed), snapshot_ns=snapshots.elapsed, snapshot_stall_ns=snapshots.stalls)
        return report

    sides = [Side(f"{bench.scale.snapshots} snapshots", with_snapshots), Side("none", alone)]
    reports = bench.measure("gap", "longest gap, mix QD4", sides, [
        Compare(0, 1, NO_STALL, "gap_ns_max", DIFFERENCE),
        Compare(0, 1, name="rate meanwhile, mix QD4"),
    ], load)
    fewest = min(report["snapshots"] for report in reports[0])
    if fewest < bench.scale.snapshots and not bench.scale.quick:
        bench.note(f"gap: only {fewest} snapshots were taken while a load ran")


def group_bytes(bench, stack):
    """Bytes written to files for first writes after a snapshot, the snapshot included; on a real disk."""
    if bench.arguments.self_check:
        return
    store = open_store(bench, stack, "bytes", directory=bench.disk_dir())
    disk = store.disk("bytes", "stratablk", size=bench.scale.base_bytes)
    stride = ["--rw", "write", "--pattern", "once", "--stride", CLUSTER, "--depth", 32,
              "--working-set", bench.scale.base_bytes]
    sync = ["--rw", "writeflush", "--count", 1, "--working-set", CLUSTER]
    ratios, counters = [], []
    for pair in range(min(3, bench.scale.pairs)):
        seed = bench.arguments.seed + pair
        # Nothing that is left from before.
        bench.load.run(disk, *sync, seed=seed)
        before = probes.io_counters(store.pid)
        disk.snapshot()
        written = sum(bench.load.run(disk, *load, seed=seed)["operations"] * 4096 for load in (stride, sync))
        after = probes.io_counters(store.pid)
        counters.append({name: after[name] - before[name] for name in after})
        # What the process made the kernel write, in whole pages, to whichever file: journals, maps and catalog too.
        ratios.append(counters[-1]["write_bytes"] / written)
    bench.record_value("bytes", "first write 4K QD32, one in 64 KiB", "stratablk", "bytes written / guest bytes", ratios,
                       FEW_BYTES, counters=counters)


def group_timeline(bench, stack):
    """4 KiB writes at random, from a snapshot on, over time; for the plot, not judged."""
    seconds = 0.2 if bench.scale.quick else 2.0
    load = [*random(bench, "write", 32), "--seconds", seconds, "--timeline", SLICE_SECONDS]
    series = []
    if not bench.arguments.self_check:
        store = open_store(bench, stack, "timeline")
        disk = store.disk("timeline", "stratablk", base=make_base(bench))
        fill(bench, disk)
        disk.snapshot()
        series.append(("stratablk", bench.load.run(disk, *load)))
    for extended, label in ((False, "qcow2 64K"), (True, "qcow2 128K extended L2")):
        overlay = FreshOverlay(bench, extended, label)
        stack.callback(overlay.discard)
        series.append((label, bench.load.run(overlay.make(), *load)))
        overlay.discard()
    for label, report in series:
        slices = report["timeline"]["operations"]
        print(f"  {label}: {slices[0] / SLICE_SECONDS:.3g} op/s in the first {SLICE_SECONDS * 1000:g} ms, "
              f"{report['iops']:.3g} over {seconds:g} s", flush=True)
    bench.records.append({"group": "timeline", "case": "write 4K QD32 after a snapshot", "disturbed": [], "rows": [],
                          "load": [str(part) for part in load],
                          "sides": [{"label": label, "reports": [report]} for label, report in series]})
