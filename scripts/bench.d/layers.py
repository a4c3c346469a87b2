"""Cases about layers: chains of them, the first write after a snapshot, and what taking snapshots does to the load."""
import contextlib
import os
import time

from backends import QsdDisk, make_overlay, remove
from hot import at_least, open_store, random, warm
from measure import Compare, Side

CLUSTER = 64 << 10
# Writes of 4 KiB between two snapshots, where a snapshot saw a few.
FEW_WRITES = 4
DEEP = at_least(0.95, "reads cost the same at any depth")
SHALLOWER = at_least(8, "a read looks at one table, however many layers there are")
NOTHING_COPIED = at_least(12, "a first write copies nothing")
NO_METADATA = at_least(5, "no metadata is written before the data")
JUST_A_WRITE = at_least(0.9, "a first write is a write")


def make_base(bench):
    """A raw image full of data, the base of all chains."""
    base = bench.work / "base.raw"
    if not base.exists():
        piece = bytearray(os.urandom(1 << 20))
        with open(base, "wb") as file:
            for number in range(bench.scale.base_bytes >> 20):
                piece[:8] = number.to_bytes(8, "little")
                file.write(piece)
    return base


def layer_clusters(bench):
    """Half of the working set lies in the layers, as many clusters as every depth can share out."""
    return bench.scale.warm_bytes // CLUSTER // 2 // bench.scale.deep * bench.scale.deep


def write_layer(bench, disk, layer, unit, count):
    """Writes what a layer owns: `count` scattered units, none that another layer owns. Which ones depends on the
    layer alone, so `depth` layers of `count` units hold the same as one of `depth * count`, in every back-end."""
    bench.load.run(disk, "--rw", "write", "--pattern", "once", "--block", unit, "--stride", unit,
                   "--working-set", bench.scale.warm_bytes, "--skip", layer * count, "--count", count,
                   "--depth", 1, seed=bench.arguments.seed + 1000)


def qsd_chain(bench, name, depth):
    """A chain of `depth` qcow2 files over the base, each with clusters of its own."""
    layers, formats = [make_base(bench)], ["raw"]
    for layer in range(depth):
        path = bench.work / f"{name}.{layer}.qcow2"
        make_overlay(path, layers[-1], formats[-1], extended=False)
        layers.append(path)
        formats.append("qcow2")
        disk = QsdDisk(bench.work, name, bench.arguments.server_cpu, layers, formats, f"qcow2 depth {depth}")
        with contextlib.ExitStack() as stack:
            stack.callback(disk.stop)
            write_layer(bench, disk, layer, CLUSTER, layer_clusters(bench) // depth)
            if layer == depth - 1:
                # The whole chain is there: it stays up for the caller.
                stack.pop_all()
    return disk, layers[1:]


def stratablk_chain(bench, store, name, depth, unit=CLUSTER, units=None):
    """A volume over the base with `depth` layers that own `units` together (clusters over half of the working set, if
    nothing is said), made by taking snapshots."""
    disk = store.disk(name, f"stratablk depth {depth}", base=make_base(bench))
    for layer in range(depth):
        if layer:
            disk.snapshot()
        write_layer(bench, disk, layer, unit, (units or layer_clusters(bench)) // depth)
    return disk


def group_chain(bench, stack):
    """Chains of the same depth, layers owning the same clusters."""
    deepest = max(bench.scale.depths)
    store = None if bench.arguments.self_check else open_store(bench, stack, "chain")
    for depth in bench.scale.depths:
        with contextlib.ExitStack() as inner:
            if bench.arguments.self_check:
                ours, files = qsd_chain(bench, f"self{depth}", depth)
                inner.callback(remove, *files)
                inner.callback(ours.stop)
            else:
                ours = stratablk_chain(bench, store, f"chain{depth}", depth)
            theirs, files = qsd_chain(bench, f"chain{depth}", depth)
            inner.callback(remove, *files)
            inner.callback(theirs.stop)
            for disk in (ours, theirs):
                warm(bench, disk)
            for queue_depth in (1, 32):
                load = random(bench, "read", queue_depth)
                target = SHALLOWER if depth == deepest and queue_depth == 32 else None
                bench.measure("chain", f"read 4K QD{queue_depth}, depth {depth}",
                              [bench.load_side(disk, *load) for disk in (ours, theirs)], [Compare(0, 1, target)], load)


def group_depth(bench, stack):
    """The same data at depth 1 and at depth 1,000, both in stratablk."""
    if bench.arguments.self_check:
        print("  (has no qemu-storage-daemon side)")
        return
    store = open_store(bench, stack, "depth")
    # The usual case, where each snapshot saw a few writes, and the harsh one, where every second read goes to
    # another of a thousand files if it is not in the cache.
    few = FEW_WRITES * bench.scale.deep
    for what, layout in ((f"{FEW_WRITES} writes a layer", {"unit": 4096, "units": few}), ("half in the layers", {})):
        name = what.replace(" ", "-")
        shallow = stratablk_chain(bench, store, f"shallow-{name}", 1, **layout)
        began = time.monotonic()
        deep = stratablk_chain(bench, store, f"deep-{name}", bench.scale.deep, **layout)
        print(f"  took {bench.scale.deep - 1} snapshots in {time.monotonic() - began:.1f} s", flush=True)
        for disk in (deep, shallow):
            warm(bench, disk)
        for queue_depth in (1, 32):
            load = random(bench, "read", queue_depth)
            bench.measure("depth", f"read 4K QD{queue_depth}, {what}",
                          [bench.load_side(disk, *load) for disk in (deep, shallow)], [Compare(0, 1, DEEP)], load)


class FreshOverlay:
    """A qcow2 file over the base, made anew for every run."""

    def __init__(self, bench, extended, label):
        self.bench, self.extended, self.label = bench, extended, label
        self.name = label.replace(" ", "-")
        self.path = bench.work / f"{self.name}.qcow2"
        self.disk = None

    def make(self):
        """A new one, served."""
        self.discard()
        base = make_base(self.bench)
        make_overlay(self.path, base, "raw", self.extended)
        self.disk = QsdDisk(self.bench.work, self.name, self.bench.arguments.server_cpu, [base, self.path],
                            ["raw", "qcow2"], self.label)
        return self.disk

    def discard(self):
        """Ends and removes the last one."""
        if self.disk:
            self.disk.stop()
            self.disk = None
        remove(self.path)


def group_first_write(bench, stack):
    """4 KiB writes, one in each 64 KiB, each the first since a snapshot; over a base full of data."""
    store = None if bench.arguments.self_check else open_store(bench, stack, "first")
    ours = store and store.disk("first", "stratablk", base=make_base(bench))
    overlays = [FreshOverlay(bench, False, "qcow2 64K"), FreshOverlay(bench, True, "qcow2 128K extended L2")]
    for overlay in overlays:
        stack.callback(overlay.discard)
    for queue_depth in (1, 32):
        load = ["--rw", "write", "--pattern", "once", "--stride", CLUSTER, "--depth", queue_depth,
                "--working-set", bench.scale.base_bytes]

        def write(disk, pair, load=load):
            return bench.load.run(disk, *load, seed=bench.arguments.seed + pair)

        def first(pair, write=write):
            ours.snapshot()
            return write(ours, pair)

        def fresh(overlay, write=write):
            return Side(overlay.label, lambda pair: write(overlay.make(), pair), lambda: overlay.disk.pid)

        judged = queue_depth == 32
        sides = [Side("stratablk", first, lambda: ours.pid) if ours else fresh(overlays[0])]
        sides += [fresh(overlay) for overlay in overlays]
        compare = [Compare(0, 1, NOTHING_COPIED if judged else None), Compare(0, 2, NO_METADATA if judged else None)]
        if ours:
            # The same writes once more, at once: nothing else differs but that these are no first ones.
            sides.append(Side("overwrite", lambda pair, write=write: write(ours, pair), lambda: ours.pid, follows=0))
            compare.insert(0, Compare(0, 3, JUST_A_WRITE if judged else None))
        bench.measure("first-write", f"first write 4K QD{queue_depth}", sides, compare, load)
