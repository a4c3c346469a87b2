"""Cases in which everything lies in memory: against qemu-storage-daemon, and against what the machine allows."""
import os

from backends import MemcpyDisk, QsdDisk, StratablkStore
from measure import BYTES, P50, Compare
from table import Target

FAST = "the point of the cache: no trip through the kernel"
NEAR = "what the layers and the cache may cost"
OURS, QSD, LIMIT = 0, 1, 2


def at_least(bound, why):
    """A lower bound."""
    return Target(bound, why)


def at_most(bound, why):
    """An upper bound."""
    return Target(bound, why, at_most=True)


def cache_options(bench, cache=None):
    """A cache that holds the working set."""
    return {"--cache-size": cache or bench.scale.cache_bytes, "--dirty-limit": (cache or bench.scale.cache_bytes) // 2}


def open_store(bench, stack, name, options=None, directory=None, cpus=None):
    """A store that ends with the group. Its cache is always in the directory for what is in memory."""
    options = {"--cache-dir": bench.work, **(cache_options(bench) if options is None else options)}
    store = StratablkStore(directory or bench.work, name, cpus or bench.arguments.server_cpu, bench.stratablk, options)
    stack.callback(store.stop)
    if store.left_out:
        bench.note(f"this build does not know {', '.join(store.left_out)}: measured without")
    return store


def qsd_raw(bench, name):
    """A preallocated raw file behind qemu-storage-daemon."""
    path = bench.work / f"{name}.raw"
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, bench.scale.warm_bytes)
    return QsdDisk(bench.work, name, bench.arguments.server_cpu, [path], ["raw"], "qsd raw")


def fill(bench, disk):
    """Writes the working set once, so that no measured write is a first one."""
    bench.load.run(disk, "--fill", "--block", "128K", "--depth", 8, "--working-set", bench.scale.warm_bytes)


def warm(bench, disk):
    """Reads the working set once."""
    count = bench.scale.warm_bytes >> 17
    bench.load.run(disk, "--rw", "read", "--pattern", "seq", "--block", "128K", "--depth", 8,
                   "--working-set", bench.scale.warm_bytes, "--count", count)


def random(bench, operation, depth, *more):
    """Arguments for 4 KiB at random."""
    return ["--rw", operation, "--depth", depth, "--working-set", bench.scale.warm_bytes, *more]


def group_hot(bench, stack):
    """A volume whose working set is in the cache; qemu-storage-daemon on a preallocated raw file; and the limit."""
    if bench.arguments.self_check:
        ours = qsd_raw(bench, "self")
        stack.callback(ours.stop)
    else:
        ours = open_store(bench, stack, "hot").disk("hot", "stratablk", size=bench.scale.warm_bytes)
    theirs = qsd_raw(bench, "raw")
    stack.callback(theirs.stop)
    limit = MemcpyDisk(bench.work, "limit", bench.arguments.server_cpu, bench.bin_dir / "stratablk-memcpy",
                       bench.scale.warm_bytes)
    stack.callback(limit.stop)
    disks = (ours, theirs, limit)
    for disk in disks:
        fill(bench, disk)
        warm(bench, disk)

    def versus(metric, raw, memcpy):
        return [Compare(OURS, QSD, raw, metric), Compare(OURS, LIMIT, memcpy, metric)]

    large = ("--block", "128K")
    for name, load, compare in (
        ("read 4K QD32", random(bench, "read", 32), versus("iops", at_least(3.5, FAST), at_least(0.8, NEAR))),
        ("write 4K QD32", random(bench, "write", 32), versus("iops", at_least(5, FAST), at_least(0.75, NEAR))),
        ("read 4K QD1", random(bench, "read", 1), versus(P50, at_most(0.4, FAST), at_most(1.3, NEAR))),
        ("write 4K QD1", random(bench, "write", 1), versus(P50, at_most(0.25, FAST), at_most(1.3, NEAR))),
        ("read 128K QD8", random(bench, "read", 8, *large), versus(BYTES, at_least(1.0, FAST), None)),
        ("write 128K QD8", random(bench, "write", 8, *large), versus(BYTES, at_least(1.0, FAST), None)),
        ("mix 70/30 4K QD32", random(bench, "mix", 32), [
            *versus("iops", None, None), Compare(OURS, QSD, metric="latency_ns_p99", unit="ns p99"),
            Compare(OURS, QSD, metric="server_cpu_ns_per_operation", unit="ns CPU/op")]),
    ):
        sides = [bench.load_side(disk, *load) for disk in disks]
        bench.measure("hot", name, sides, compare, load)
