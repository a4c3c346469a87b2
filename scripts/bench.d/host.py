"""The machine: what it is, and whether anything else is using it."""
import os
import platform
import subprocess
import time

# Of the CPU time of the machine, more than this share used by others spoils a measurement.
OTHERS_SHARE_MAX = 0.05
STEAL_SHARE_MAX = 0.01
# Less load than this over the last minute counts as idle, a CPU.
LOAD_A_CPU_MAX = 0.25


def first_line(command):
    """The first line of a command's output, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        return f"not there: {error.strerror}"
    lines = (done.stdout or done.stderr).splitlines()
    return lines[0] if lines else ""


def environment(root):
    """Everything that figures depend on."""
    model = ""
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    with open("/proc/meminfo", encoding="utf-8") as meminfo:
        memory_kib = int(meminfo.readline().split()[1])
    dirty = subprocess.run(["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": model,
        "cpus": os.cpu_count(),
        "memory_mib": memory_kib // 1024,
        "commit": first_line(["git", "-C", root, "rev-parse", "HEAD"]) + ("+changes" if dirty.stdout.strip() else ""),
        "qemu_storage_daemon": first_line(["qemu-storage-daemon", "--version"]),
        "rustc": first_line(["rustc", "--version"]),
        "virtualised": "hypervisor" in open("/proc/cpuinfo", encoding="utf-8").read(),
    }


def is_memory(directory):
    """Whether a directory is on a file system that keeps its files in memory."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(directory)], capture_output=True, text=True, check=False)
    return kind.stdout.strip() in ("tmpfs", "ramfs", "hugetlbfs")


def cpu_ticks():
    """Busy, stolen and all ticks of all CPUs since the start of the machine."""
    with open("/proc/stat", encoding="utf-8") as stat:
        fields = [int(field) for field in stat.readline().split()[1:]]
    user, nice, system, idle, iowait, irq, softirq, steal = fields[:8]
    busy = user + nice + system + irq + softirq
    return busy, steal, busy + steal + idle + iowait


def process_ticks(pid):
    """CPU ticks of a process and the children it has waited for; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0
    return sum(int(field) for field in fields[11:15])


def heaviest(seconds=1.0, count=5):
    """The processes that use most CPU time, as (share of a CPU, pid, name)."""
    def sample():
        ticks = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as stat:
                        text = stat.read()
                except OSError:
                    continue
                name = text[text.index("(") + 1:text.rindex(")")]
                fields = text.rsplit(")", 1)[1].split()
                ticks[int(entry)] = (int(fields[11]) + int(fields[12]), name)
        return ticks

    before = sample()
    time.sleep(seconds)
    hertz = os.sysconf("SC_CLK_TCK")
    shares = []
    for pid, (ticks, name) in sample().items():
        if pid in before and pid != os.getpid():
            shares.append(((ticks - before[pid][0]) / hertz / seconds, pid, name))
    return sorted(shares, reverse=True)[:count]


def kernel_ticks():
    """CPU ticks of the kernel's own threads: what they do (write back files, run timers) is done for those measured."""
    total = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as stat:
                    fields = stat.read().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                continue
            # The parent of all kernel threads is 2.
            if fields[1] == "2":
                total += int(fields[11]) + int(fields[12])
    return total


class Watch:
    """How much of the machine others used between `start` and `stop`."""

    def __init__(self, pids):
        """`pids`: the back-ends, looked up again at each sample. This process and the children that it has waited for
        count by themselves."""
        self.pids = pids
        self.cpus = os.cpu_count()
        self.before = None

    def sample(self):
        """Busy ticks of others, stolen ticks, all ticks."""
        busy, steal, total = cpu_ticks()
        ours = sum(process_ticks(pid) for pid in {os.getpid(), *self.pids})
        return busy - ours - kernel_ticks(), steal, total

    def start(self):
        """Begins to watch."""
        self.before = self.sample()

    def stop(self):
        """Shares of the machine's time: used by others, stolen by the hypervisor."""
        others, steal, total = (now - then for now, then in zip(self.sample(), self.before))
        total = max(total, 1)
        return max(others, 0) / total, steal / total


def why_busy(others, steal, load, cpus):
    """Why figures from this machine would mean nothing, in words; empty if it is idle enough."""
    reasons = []
    if others > OTHERS_SHARE_MAX:
        reasons.append(f"other processes use {others:.0%} of the CPU time")
    if steal > STEAL_SHARE_MAX:
        reasons.append(f"the hypervisor takes {steal:.0%} of the CPU time away")
    if load > LOAD_A_CPU_MAX * cpus:
        reasons.append(f"the load of the last minute is {load:.2f}")
    return reasons
