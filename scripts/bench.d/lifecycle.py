"""What the commands on a tree of layers take, while the disk is served: against the same on chains of qcow2 files."""
import time

from backends import Failed, command, make_overlay
from hot import at_most, open_store
from layers import CLUSTER
from measure import Compare, Side
from qmp import QcowChain

TIME = "nanoseconds"
# A layer that holds much, and one that holds little.
MUCH, LITTLE = 64 << 20, 4 << 20
SAME_AT_ANY_SIZE = at_most(1.2, "a snapshot does not look at the disk")
# How long a job may take, and how often it is asked after.
JOB_SECONDS, POLL_SECONDS = 120, 0.0005


def took(seconds):
    """A report of a side that was a command."""
    return {TIME: seconds * 1e9, "operations": 0}


def write(bench, disk, size, seed):
    """Fills so many bytes of clusters, scattered over the disk."""
    bench.load.run(disk, "--rw", "write", "--pattern", "once", "--block", CLUSTER, "--stride", CLUSTER,
                   "--working-set", bench.scale.warm_bytes, "--count", size // CLUSTER, "--depth", 8, seed=seed)


def finish(store, jobs):
    """Waits for jobs to end well."""
    deadline = time.monotonic() + JOB_SECONDS
    for number in jobs:
        while (job := store.get(f"/v1/jobs/{number}"))["state"] != "done":
            if job["state"] in ("failed", "cancelled", "paused") or time.monotonic() > deadline:
                raise Failed(f"job {number}: {job}")
            time.sleep(POLL_SECONDS)


def delete(disk, snapshot, way=None):
    """Deletes a snapshot with what follows from it; returns how long that took, in seconds."""
    query = f"?way={way}" if way else ""
    began = time.monotonic()
    report = disk.store.get(f"/v1/snapshots/{disk.name}/{snapshot}{query}", "DELETE")
    finish(disk.store, [job["id"] for job in report["jobs"]])
    return time.monotonic() - began


def snapshot(disk):
    """Takes a snapshot; returns how long that took, in seconds."""
    began = time.monotonic()
    disk.snapshot()
    return time.monotonic() - began


def raw_file(bench, name):
    """An empty image of the size of the working set."""
    path = bench.work / f"{name}.raw"
    with open(path, "wb") as file:
        file.truncate(bench.scale.warm_bytes)
    return path


def group_lifecycle(bench, stack):
    """Snapshot, delete, merge and restore of a served disk, against QMP and qemu-img on qcow2 files."""
    if bench.arguments.self_check:
        return
    store = open_store(bench, stack, "lifecycle")
    case_snapshot(bench, stack, store)
    case_sizes(bench, store)
    for name, lower, upper in (("64 MiB under 4 MiB", MUCH, LITTLE), ("4 MiB under 64 MiB", LITTLE, MUCH)):
        case_delete(bench, stack, store, name, lower, upper)
        case_delete_active(bench, stack, store, name, lower, upper)
    case_restore(bench, store)


def pair_of_disks(bench, stack, store, name):
    """A volume and a chain of qcow2 files, each over an empty image."""
    ours = store.disk(name, "stratablk", base=raw_file(bench, f"{name}.ours"))
    theirs = QcowChain(bench.work, name, bench.arguments.server_cpu, raw_file(bench, f"{name}.theirs"))
    stack.callback(theirs.stop)
    return ours, theirs


def case_snapshot(bench, stack, store):
    """A snapshot with something to be sealed."""
    ours, theirs = pair_of_disks(bench, stack, store, "snapshot")

    def side(disk, act):
        def run(pair):
            write(bench, disk, LITTLE, bench.arguments.seed + pair)
            return took(act(disk))
        return Side(disk.label, run)

    sides = [side(ours, snapshot), side(theirs, QcowChain.snapshot)]
    bench.measure("lifecycle", "snapshot, 4 MiB written before", sides,
                  [Compare(0, 1, metric=TIME, unit="ns")])


def case_sizes(bench, store):
    """The same of a large disk and of a small one."""
    disks = [store.disk(f"size{gib}", f"{gib} GiB", size=gib << 30) for gib in (1024, 1)]

    def side(disk):
        def run(pair):
            write(bench, disk, LITTLE, bench.arguments.seed + pair)
            return took(snapshot(disk))
        return Side(disk.label, run)

    bench.measure("lifecycle", "snapshot of 1 TiB against 1 GiB", [side(disk) for disk in disks],
                  [Compare(0, 1, SAME_AT_ANY_SIZE, TIME, unit="ns")])


def case_delete(bench, stack, store, name, lower, upper):
    """A layer in the middle of the chain goes."""
    ours, theirs = pair_of_disks(bench, stack, store, f"middle{lower >> 20}")
    streamed = QcowChain(bench.work, f"stream{lower >> 20}", bench.arguments.server_cpu,
                         raw_file(bench, f"stream{lower >> 20}"), "qcow2 64K stream")
    stack.callback(streamed.stop)
    theirs.label = "qcow2 64K commit"

    for chain in (theirs, streamed):
        # What is written first goes over the raw file, as ours does.
        chain.snapshot()

    def grow(disk, pair):
        """Two more layers, sealed."""
        for number, size in enumerate((lower, upper)):
            write(bench, disk, size, bench.arguments.seed + 2 * pair + number)
            disk.snapshot()

    def run_ours(pair):
        grow(ours, pair)
        return took(delete(ours, f"s{ours.snapshots - 1}"))

    def run_commit(pair):
        grow(theirs, pair)
        upper = theirs.below(theirs.top)
        return took(theirs.commit(upper, theirs.below(upper)))

    def run_stream(pair):
        grow(streamed, pair)
        upper = streamed.below(streamed.top)
        return took(streamed.stream(upper, streamed.below(streamed.below(upper))))

    sides = [Side("stratablk", run_ours), Side(theirs.label, run_commit), Side(streamed.label, run_stream)]
    bench.measure("lifecycle", f"delete in the middle, {name}", sides,
                  [Compare(0, 1, metric=TIME, unit="ns"), Compare(0, 2, metric=TIME, unit="ns")])


def case_delete_active(bench, stack, store, name, lower, upper):
    """The layer below the active one goes, while the disk is served."""
    ours, theirs = pair_of_disks(bench, stack, store, f"active{lower >> 20}")
    theirs.label = "qcow2 64K commit"

    def run_ours(pair):
        write(bench, ours, lower, bench.arguments.seed + 2 * pair)
        ours.snapshot()
        write(bench, ours, upper, bench.arguments.seed + 2 * pair + 1)
        return took(delete(ours, f"s{ours.snapshots}"))

    def run_commit(pair):
        if pair == 0:
            theirs.snapshot()
        write(bench, theirs, lower, bench.arguments.seed + 2 * pair)
        below = theirs.top
        theirs.snapshot()
        write(bench, theirs, upper, bench.arguments.seed + 2 * pair + 1)
        return took(theirs.commit(theirs.top, below))

    bench.measure("lifecycle", f"delete below the active layer, {name}",
                  [Side("stratablk", run_ours), Side(theirs.label, run_commit)], [Compare(0, 1, metric=TIME, unit="ns")])


def case_restore(bench, store):
    """A disk goes back to a snapshot; both by a command line, since qemu-img is one."""
    ours = store.disk("restore", "stratablk", size=bench.scale.warm_bytes)
    write(bench, ours, LITTLE, bench.arguments.seed)
    ours.snapshot()
    raw, path = raw_file(bench, "restore"), bench.work / "restore.qcow2"
    make_overlay(path, raw, "raw", extended=False)
    command(["qemu-img", "snapshot", "-c", "s1", str(path)])

    def run_ours(pair):
        write(bench, ours, LITTLE, bench.arguments.seed + pair)
        began = time.monotonic()
        store.cli("snapshot", "restore", ours.name, "s1")
        return took(time.monotonic() - began)

    def run_theirs(pair):
        command(["qemu-io", "-c", f"write -q -P {pair + 1} 0 {LITTLE}", str(path)])
        began = time.monotonic()
        command(["qemu-img", "snapshot", "-a", "s1", str(path)])
        return took(time.monotonic() - began)

    bench.measure("lifecycle", "restore, 4 MiB written since", [Side("stratablk", run_ours), Side("qemu-img", run_theirs)],
                  [Compare(0, 1, metric=TIME, unit="ns")])
