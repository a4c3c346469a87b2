"""What the kernel knows of a process: memory, CPU time, system calls, bytes written."""
import re
import shutil
import signal
import subprocess
import tempfile
import time


def status_bytes(pid, field):
    """A line of /proc/PID/status that is in kB; 0 if the process has gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
            for line in status:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) << 10
    except (OSError, IndexError, ValueError):
        pass
    return 0


def resident_bytes(pid):
    """Memory of a process, shared memory that it has touched included."""
    return status_bytes(pid, "VmRSS")


def cpu_nanoseconds(pid):
    """CPU time of all threads of a process so far, of those that have ended as well, to the nanosecond."""
    # The kernel's name of the clock, as clock_getcpuclockid(3) makes it.
    return time.clock_gettime_ns((~pid << 3) | 2)


def io_counters(pid):
    """/proc/PID/io as a dictionary."""
    with open(f"/proc/{pid}/io", encoding="ascii") as counters:
        return {name: int(value) for name, value in (line.split(":") for line in counters)}


class Syscalls:
    """Counts the system calls of all threads of a process while it is entered: with `perf stat`, which disturbs least, or
    with `strace -c`. `total` is None where neither works."""

    def __init__(self, pid):
        self.pid, self.total = pid, None
        self.output = tempfile.NamedTemporaryFile("r", prefix="stratablk-bench.", suffix=".syscalls")
        self.tool = next((tool for tool in ("perf", "strace") if shutil.which(tool)), None)
        self.process = None

    def __enter__(self):
        commands = {
            "perf": ["perf", "stat", "-x,", "-e", "raw_syscalls:sys_enter", "-o", self.output.name, "-p", str(self.pid)],
            "strace": ["strace", "-c", "-f", "-qq", "-o", self.output.name, "-p", str(self.pid)],
        }
        if self.tool:
            self.process = subprocess.Popen(commands[self.tool], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.DEVNULL)
            # Neither says when it is there.
            time.sleep(0.15)
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.total = parse_count(self.tool, self.output.read())
        self.output.close()


def parse_count(tool, text):
    """The number of calls in what `perf stat -x,` or `strace -c` wrote; None if there is none."""
    if tool == "perf":
        found = re.search(r"^(\d+),[^,]*,raw_syscalls:sys_enter", text, re.MULTILINE)
        return int(found.group(1)) if found else None
    # % time, seconds, usecs/call, calls, errors (if any), "total"
    for line in text.splitlines():
        fields = line.split()
        if fields and fields[-1] == "total" and len(fields) >= 5:
            return int(fields[3])
    return 0 if tool == "strace" else None
