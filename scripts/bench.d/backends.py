"""The programs under test: stratablk, qemu-storage-daemon and the copying limit, each pinned to one CPU, and their disks."""
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time

# Whatever takes longer hangs.
PATIENCE_SECONDS = 120
QUEUES = 1


class Failed(Exception):
    """A program did not do what it was asked."""


def command(arguments, **options):
    """Runs a program that must succeed; returns its output."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, **options)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


class Server:
    """A back-end process on a CPU of its own."""

    # All that run: what they use of the machine is no disturbance.
    live = set()

    def __init__(self, arguments, cpu, log):
        """`cpu`: a list as taskset takes it."""
        self.log_path = log
        with open(log, "ab") as output:
            self.process = subprocess.Popen(["taskset", "-c", str(cpu), *map(str, arguments)],
                                            stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        Server.live.add(self.process.pid)

    @property
    def pid(self):
        """Of the program itself: taskset has replaced itself by it."""
        return self.process.pid

    def wait_for(self, path, ready):
        """Waits until `ready(path)`. Nothing is left behind if that fails."""
        try:
            self.wait_until_ready(path, ready)
        except BaseException:
            self.stop()
            raise

    def wait_until_ready(self, path, ready):
        """The wait itself."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not ready(path):
            if self.process.poll() is not None:
                raise Failed(f"{self.process.args}: ended with {self.process.returncode}\n{self.log()}")
            if time.monotonic() > deadline:
                raise Failed(f"nothing listens on {path}\n{self.log()}")
            time.sleep(0.005)

    def log(self):
        """What it said, the end of it."""
        with open(self.log_path, encoding="utf-8", errors="replace") as log:
            return log.read()[-4000:]

    def stop(self):
        """Asks it to end, and makes it; nothing if it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        Server.live.discard(self.process.pid)


def answers(path):
    """Whether a connection to the socket at `path` is taken."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def listens(path):
    """The same by the kernel's table, for servers to which a connection is a session. They bound to that very path."""
    path = str(path)
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
        for line in table:
            fields = line.split()
            # Flags bit 16 is __SO_ACCEPTCON.
            if len(fields) >= 8 and fields[7] == path and int(fields[3], 16) & 0x10000:
                return True
    return False


class Load:
    """The load generator."""

    def __init__(self, program, cpu, seed):
        self.program, self.cpu, self.seed = program, cpu, seed

    def run(self, disk, *arguments, seed=None):
        """One run against a disk; returns its report."""
        return json.loads(command(self.arguments(disk, *arguments, seed=seed)))

    def straight(self, path, *arguments, seed=None):
        """The same to a file, without a back-end."""
        seed = self.seed if seed is None else seed
        return json.loads(command([str(argument) for argument in (
            self.program, "--file", path, "--cpu", self.cpu, "--json", "--seed", seed, *arguments)]))

    def arguments(self, disk, *arguments, seed=None):
        """The command line of such a run."""
        seed = self.seed if seed is None else seed
        return [str(argument) for argument in (
            self.program, "--socket", disk.socket, "--cpu", self.cpu, "--server-pid", disk.pid, "--json", "--seed", seed,
            *arguments)]


class QsdDisk:
    """A disk of qemu-storage-daemon: with an iothread and io_uring, the fair set-up."""

    def __init__(self, work, name, cpu, layers, formats, label):
        """`layers`: files from the base to the top; `formats`: their formats."""
        self.socket = work / f"{name}.sock"
        self.label = label
        node = {}
        for path, kind in zip(layers, formats):
            top = path == layers[-1]
            file = {"driver": "file", "aio": "io_uring", "filename": str(path), "read-only": not top}
            if kind == "raw" and top:
                # A raw node over the file would be one more layer to walk through for nothing.
                node = file
            else:
                below = {"backing": node} if node else {}
                node = {"driver": kind, "file": file, "read-only": not top, **below}
        node["node-name"] = "disk"
        self.server = Server(
            ["qemu-storage-daemon", "--object", "iothread,id=io0", "--blockdev", json.dumps(node), "--export",
             f"type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={self.socket},"
             f"writable=on,num-queues={QUEUES},iothread=io0"],
            cpu, work / f"{name}.log")
        self.server.wait_for(self.socket, listens)

    @property
    def pid(self):
        """Of the back-end."""
        return self.server.pid

    def stop(self):
        """Ends the back-end."""
        self.server.stop()


class MemcpyDisk:
    """Memory as a disk, one copy a request, behind the rings and sessions of stratablk: what the machine allows."""

    def __init__(self, work, name, cpu, program, size, label="memcpy limit", pages="huge"):
        self.socket, self.label = work / f"{name}.sock", label
        self.server = Server([program, "--socket-path", self.socket, "--size", size, "--pages", pages, "--queues", QUEUES],
                             cpu, work / f"{name}.log")
        self.server.wait_for(self.socket, listens)

    @property
    def pid(self):
        """Of the back-end."""
        return self.server.pid

    def stop(self):
        """Ends the back-end."""
        self.server.stop()


class Unix(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=PATIENCE_SECONDS)
        self.path = str(path)

    def connect(self):
        """To the socket, whatever the name of the host."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE_SECONDS)
        self.sock.connect(self.path)


def known_options(program):
    """The options that `serve` of this build has."""
    return frozenset(word.strip(",") for word in command([str(program), "serve", "--help"]).split() if word.startswith("--"))


class StratablkStore:
    """A running stratablk with a store of its own."""

    def __init__(self, work, name, cpu, program, options=None, only_known=True):
        """`options`: of `serve`, with their values (None: a flag); those that this build does not know are left out."""
        self.work, self.program = work, program
        self.store = work / f"{name}.store"
        self.control = self.store / "control.sock"
        known = known_options(program)
        self.left_out = [option for option in options or () if option not in known]
        extra = []
        for option, value in (options or {}).items():
            if option in known or not only_known:
                extra += [option] if value is None else [option, value]
        self.server = Server([program, "serve", "--store", self.store, *extra], cpu, work / f"{name}.log")
        # The control socket gets its name after it listens, so the kernel's table knows it by another one.
        self.server.wait_for(self.control, answers)

    def cli(self, *arguments):
        """A command of the CLI."""
        return command([str(part) for part in (self.program, "--control", self.control, *arguments)])

    @property
    def pid(self):
        """Of the daemon."""
        return self.server.pid

    def ask(self, method, path, body=None):
        """A request to the control socket, without a process for it; returns the text of the reply."""
        with contextlib.closing(Unix(self.control)) as connection:
            headers = {"content-type": "application/json"} if body is not None else {}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode()
            if response.status >= 300:
                raise Failed(f"{method} {path}: {response.status} {text}")
            return text

    def get(self, path, method="GET"):
        """A request to the control socket without a body; returns the document of the reply."""
        return json.loads(self.ask(method, path))

    def metrics(self):
        """The daemon's metrics that have no labels."""
        found = {}
        for line in self.ask("GET", "/metrics").splitlines():
            name, _, value = line.partition(" ")
            if not line.startswith("#") and "{" not in name:
                found[name] = float(value)
        return found

    def disk(self, name, label, size=None, base=None, snapshot=None):
        """Creates and attaches a volume."""
        source = ["--base", base] if base else ["--from", snapshot] if snapshot else ["--size", size]
        self.cli("volume", "create", name, *source)
        path = self.work / f"{self.store.name}.{name}.sock"
        self.cli("volume", "attach", name, "--socket", path, "--queues", QUEUES)
        return StratablkDisk(self, name, path, label)

    def stop(self):
        """Ends the daemon."""
        self.server.stop()


class StratablkDisk:
    """A volume of stratablk."""

    def __init__(self, store, name, path, label):
        self.store, self.name, self.socket, self.label = store, name, path, label
        self.snapshots = 0

    @property
    def pid(self):
        """Of the back-end."""
        return self.store.server.pid

    def snapshot(self):
        """Takes a snapshot."""
        self.snapshots += 1
        # Not with the command line, whose start takes longer than a snapshot: chains of a thousand are made here.
        self.store.ask("POST", "/v1/snapshots", {"name": f"s{self.snapshots}", "volumes": [self.name]})

    def stop(self):
        """Ends the back-end."""
        self.store.stop()


def make_overlay(path, base, base_format, extended):
    """A new qcow2 file over another."""
    options = "cluster_size=128k,extended_l2=on" if extended else "cluster_size=64k"
    command(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", str(base), "-F", base_format, str(path)])


def remove(*paths):
    """Removes files that may be gone."""
    for path in paths:
        if os.path.exists(path):
            os.unlink(path)
