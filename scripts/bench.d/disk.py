"""Cases on a real disk: flushes against a loop of pwrite and fdatasync, and reads that miss against fio."""
import json
import os

from backends import QsdDisk, command
from hot import at_least, at_most, cache_options, open_store
from measure import BYTES, IOPS, MEAN, Compare, Side

BLOCK = 4096
ONE_SYNC = at_most(1.25, "one sync where the map has all it needs")
TWO_SYNCS = at_most(2.2, "data first, then the journal that says where it is")
TOGETHER = at_least(3, "many flushes share one sync")
RAW_SPEED = at_least(0.9, "a miss costs what the disk costs")


class Flushes:
    """Writes that are each flushed: over what is there, or each the first in its place."""

    def __init__(self, bench, first_writes):
        self.bench, self.first_writes = bench, first_writes
        self.size = bench.scale.warm_bytes
        self.timing = ["--warmup", bench.scale.warmup, "--seconds", bench.scale.seconds]
        # First writes go to places that no other round uses.
        self.places = self.size // BLOCK // (bench.scale.pairs + 1)

    def load(self, pair, *depth):
        """Arguments of a run."""
        where = ["--working-set", self.size]
        if self.first_writes:
            where += ["--pattern", "once", "--stride", BLOCK, "--skip", pair * self.places, "--count", self.places]
        return ["--rw", "writeflush", *depth, *where, *self.timing]

    def seed(self, pair):
        """The order of first writes is the same in all rounds, so that each can take up where the last one ended."""
        return self.bench.arguments.seed + (0 if self.first_writes else pair)

    def fill(self, disk):
        """Writes all of a disk, unless first writes are wanted."""
        if not self.first_writes:
            self.bench.load.run(disk, "--fill", "--block", "128K", "--depth", 8, "--working-set", self.size)
        return disk

    def side(self, disk, depth):
        """A disk under this load."""
        return Side(disk.label, lambda pair: self.bench.load.run(
            disk, *self.load(pair, "--depth", depth), seed=self.seed(pair)), lambda: disk.pid)

    def loop(self, path):
        """The same in a loop of system calls on a file of the same file system."""
        with open(path, "wb") as file:
            file.truncate(self.size)
        if not self.first_writes:
            self.bench.load.straight(path, "--fill", "--block", "128K")
        return Side("pwrite+fdatasync", lambda pair: self.bench.load.straight(path, *self.load(pair), seed=self.seed(pair)))

    def qcow2(self, stack, name):
        """A qcow2 disk of qemu-storage-daemon in the same file system."""
        path = self.bench.disk_dir() / f"{name}.qcow2"
        command(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", str(path), str(self.size)])
        disk = QsdDisk(self.bench.work, name, self.bench.arguments.server_cpu, [path], ["qcow2"], "qsd qcow2")
        stack.callback(disk.stop)
        return self.fill(disk)


def group_flush(bench, stack):
    """Write + flush, one at a time against a loop of pwrite and fdatasync, eight at a time against qcow2; on a real disk."""
    directory = bench.disk_dir()
    store = None if bench.arguments.self_check else open_store(
        bench, stack, "flush", {**cache_options(bench), "--direct-io": None}, directory=directory)
    for what, first_writes, single, eight in (("no new map bits", False, ONE_SYNC, TOGETHER),
                                              ("new map bits", True, TWO_SYNCS, None)):
        flushes = Flushes(bench, first_writes)
        name = what.replace(" ", "-")

        def ours(name, flushes=flushes):
            if store:
                return flushes.fill(store.disk(name, "stratablk", size=flushes.size))
            return flushes.qcow2(stack, f"self-{name}")

        disk = ours(name)
        bench.measure("flush", f"write+flush 4K QD1, {what}",
                      [flushes.side(disk, 1), flushes.loop(directory / f"{name}.raw")],
                      [Compare(0, 1, single, MEAN)], flushes.load(0, "--depth", 1))
        # The rounds above have written in the first places already.
        disk = ours(f"{name}-8") if first_writes else disk
        theirs = flushes.qcow2(stack, f"eight-{name}")
        bench.measure("flush", f"8 flushing writers, {what}", [flushes.side(disk, 8), flushes.side(theirs, 8)],
                      [Compare(0, 1, eight, unit="flush/s")], flushes.load(0, "--depth", 8))


def make_cold(bench, directory):
    """A file of more data than any cache here holds, on the disk and not in the kernel's memory."""
    path = directory / "cold.raw"
    piece = bytearray(os.urandom(1 << 20))
    with open(path, "wb") as file:
        for number in range(bench.scale.cold_bytes >> 20):
            piece[:8] = number.to_bytes(8, "little")
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def fio(bench, path, block, depth, pair):
    """One run of fio that reads a file at random; the figures under the names of the load generator's report."""
    run, ramp = (f"{round(seconds * 1000)}ms" for seconds in (bench.scale.seconds, bench.scale.warmup))
    text = command([
        "fio", "--name=cold", f"--filename={path}", "--readonly", "--rw=randread", f"--bs={block}", f"--iodepth={depth}",
        "--ioengine=io_uring", "--direct=1", "--time_based", f"--runtime={run}", f"--ramp_time={ramp}", "--norandommap",
        "--randrepeat=0", f"--randseed={bench.arguments.seed + pair}", f"--cpus_allowed={bench.arguments.server_cpu}",
        "--output-format=json"])
    # Notes may come before the document.
    read = json.loads(text[text.index("{"):])["jobs"][0]["read"]
    latency = read["clat_ns"]
    percentiles = latency.get("percentile", {})
    return {"iops": read["iops"], "bytes_per_second": read["bw_bytes"], "operations": read["total_ios"],
            "seconds": read["runtime"] / 1000, "latency_ns_mean": latency["mean"],
            "latency_ns_p50": percentiles.get("50.000000"), "latency_ns_p99": percentiles.get("99.000000")}


def group_cold(bench, stack):
    """Reads that miss, of far more data than the cache holds, with O_DIRECT, against fio on the same file; on a real disk."""
    if bench.arguments.self_check:
        return
    directory = bench.disk_dir()
    path = make_cold(bench, directory)
    cache = bench.scale.cold_bytes // 64
    store = open_store(bench, stack, "cold", {"--cache-size": cache, "--dirty-limit": cache // 2, "--direct-io": None},
                       directory=directory)
    disk = store.disk("cold", "stratablk", base=path)
    for name, block, depth, metric in (("cold read 4K QD32", BLOCK, 32, IOPS),
                                       ("cold read 128K QD8", 128 << 10, 8, BYTES)):
        load = ["--rw", "read", "--block", block, "--depth", depth, "--working-set", bench.scale.cold_bytes]
        fio_side = Side("fio io_uring O_DIRECT",
                        lambda pair, block=block, depth=depth: fio(bench, path, block, depth, pair))
        bench.measure("cold", name, [bench.load_side(disk, *load), fio_side], [Compare(0, 1, RAW_SPEED, metric)], load)
