"""qemu-storage-daemon with a monitor, and what it does to a chain of qcow2 files while a disk is served."""
import json
import os
import socket
import time

from backends import PATIENCE_SECONDS, QUEUES, Failed, Server, listens


class Monitor:
    """A connection to a QMP socket."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("r", encoding="utf-8")
        self.events = []
        self.read()
        self.ask("qmp_capabilities")

    def read(self):
        """The next message."""
        line = self.lines.readline()
        if not line:
            raise Failed("qemu-storage-daemon closed its monitor")
        return json.loads(line)

    def ask(self, name, **arguments):
        """A command; returns what it returns."""
        request = {"execute": name, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = self.read()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise Failed(f"{name}: {answer['error']['desc']}")
            else:
                return answer.get("return")

    def finish(self, job):
        """Waits until a job has ended well; one that only waits to be told to change over is told."""
        while True:
            event = self.events.pop(0) if self.events else self.read()
            data = event.get("data", {})
            if event.get("event") == "BLOCK_JOB_READY" and data.get("device") == job:
                self.ask("job-complete", id=job)
            if event.get("event") == "BLOCK_JOB_ERROR":
                raise Failed(f"job {job}: {data}")
            if event.get("event") == "BLOCK_JOB_COMPLETED" and data.get("device") == job:
                if "error" in data:
                    raise Failed(f"job {job}: {data['error']}")
                return

    def close(self):
        """Ends the connection."""
        self.lines.close()
        self.socket.close()


class QcowChain:
    """A disk of qcow2 files over a raw one, served to a guest, whose chain grows and shrinks."""

    def __init__(self, work, name, cpu, raw, label="qcow2 64K"):
        self.work, self.name, self.label = work, name, label
        self.socket = work / f"{name}.sock"
        control = work / f"{name}.qmp"
        node = {"driver": "file", "aio": "io_uring", "filename": str(raw), "node-name": "n0"}
        self.server = Server(
            ["qemu-storage-daemon", "--object", "iothread,id=io0", "--chardev",
             f"socket,id=qmp,path={control},server=on,wait=off", "--monitor", "chardev=qmp",
             "--blockdev", json.dumps(node), "--export",
             f"type=vhost-user-blk,id=export,node-name=n0,addr.type=unix,addr.path={self.socket},"
             f"writable=on,num-queues={QUEUES},iothread=io0"],
            cpu, work / f"{name}.log")
        self.server.wait_for(self.socket, listens)
        self.files = [raw]
        # The numbers of the nodes, from the raw file up to the one that takes the writes.
        self.chain = [0]
        self.monitor = Monitor(control)
        self.jobs = 0

    @property
    def pid(self):
        """Of the back-end."""
        return self.server.pid

    @property
    def top(self):
        """The number of the node that takes the writes."""
        return self.chain[-1]

    def snapshot(self):
        """One more file on top; returns how long that took, in seconds."""
        number = len(self.files)
        path = self.work / f"{self.name}.{number}.qcow2"
        began = time.monotonic()
        self.monitor.ask("blockdev-snapshot-sync", node_name=f"n{self.top}", snapshot_file=str(path), format="qcow2",
                         snapshot_node_name=f"n{number}")
        took = time.monotonic() - began
        self.files.append(path)
        self.chain.append(number)
        return took

    def commit(self, top, base):
        """Moves what `top` holds down into `base`; returns how long that took, in seconds."""
        took = self.job("block-commit", device=f"n{self.top}", top_node=f"n{top}", base_node=f"n{base}")
        self.chain = [node for node in self.chain if not base < node <= top]
        return took

    def stream(self, into, base):
        """Moves what lies between `base` and `into` up; returns how long that took, in seconds."""
        took = self.job("block-stream", device=f"n{into}", base_node=f"n{base}")
        self.chain = [node for node in self.chain if not base < node < into]
        return took

    def below(self, node):
        """The number of the node below one."""
        return self.chain[self.chain.index(node) - 1]

    def job(self, name, **arguments):
        """A job, to its end."""
        self.jobs += 1
        job = f"job{self.jobs}"
        began = time.monotonic()
        self.monitor.ask(name, job_id=job, **arguments)
        self.monitor.finish(job)
        return time.monotonic() - began

    def stop(self):
        """Ends it, and removes its files but the raw one."""
        self.monitor.close()
        self.server.stop()
        for path in self.files[1:]:
            if os.path.exists(path):
                os.unlink(path)
