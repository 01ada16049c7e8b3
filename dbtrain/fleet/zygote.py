"""The warm parent of trainers: a process that has imported everything, and forks a trainer whenever one is wanted.

Importing torch, diffusers and deepspeed takes seconds; forking takes milliseconds, so a killed trainer costs the
loading of the base and no more. It has no threads and has not touched a GPU, which makes the fork safe. It dies with
its worker and takes its trainers along. Conversation over the control socket: `f` with a descriptor gives the pid of a
new trainer that speaks through it; `w` waits for the last trainer and gives its wait status.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

from dbtrain.fleet.processes import die_with_parent

NUMBER = struct.Struct("q")


class Zygote:
    """The worker's end: starts the warm parent and asks it for trainers. What keeps it from starting is raised."""

    def __init__(self, log: Path):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process: subprocess.Popen | None = None
        self.failure: Exception | None = None
        started = threading.Event()
        with theirs:
            # The kernel watches the starting thread, not the process: this one lives as long as the child.
            threading.Thread(target=self._run, args=(log, theirs, started), daemon=True).start()
            started.wait()
        if self.failure is not None:
            self.control.close()
            raise self.failure

    def _run(self, log: Path, theirs: socket.socket, started: threading.Event) -> None:
        try:
            self.process = self._start(log, theirs)
        except Exception as error:
            self.failure = error
        finally:
            started.set()
        if self.process is not None:
            self.process.wait()

    def _start(self, log: Path, theirs: socket.socket) -> subprocess.Popen:
        log.parent.mkdir(parents=True, exist_ok=True)
        # NVML tells of GPUs without starting CUDA, which would not survive a fork.
        environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        paths = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        command = [sys.executable, "-m", "dbtrain.fleet.zygote", str(theirs.fileno()), str(os.getpid())]
        with log.open("ab") as file:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
                pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip

    def fork(self, descriptor: int) -> int:
        """The pid of a new trainer that owns a copy of the descriptor. OSError if the warm parent is dead."""
        socket.send_fds(self.control, [b"f"], [descriptor])
        return self._number()

    def wait(self) -> int:
        """The wait status of the last trainer, which is dying. OSError if the warm parent is dead."""
        self.control.send(b"w")
        return self._number()

    def _number(self) -> int:
        answer = self.control.recv(NUMBER.size)
        if not answer:
            raise ConnectionResetError("the warm parent is dead")
        return NUMBER.unpack(answer)[0]

    def kill(self) -> None:
        """Kill it, and its trainers with it."""
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """Kill it and let go of it."""
        self.control.close()
        self.kill()
        if self.process is not None:
            self.process.wait()


def warm_up() -> None:
    """Import everything that training needs."""
    import dbtrain.train  # noqa: F401
    from dbtrain.engines.zero import zero_keys
    from dbtrain.families import FAMILIES
    from dbtrain.models.architectures import class_of
    from dbtrain.models.load import quiet_libraries

    zero_keys()
    quiet_libraries()
    for name in {name for family in FAMILIES.values() for names in family.components.values() for name in names}:
        class_of(name)


def serve(control: socket.socket) -> None:
    """Fork trainers until the worker is gone."""
    from multiprocessing.connection import Connection

    from dbtrain.fleet.trainer import run

    last = 0
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if message == b"w":
            control.send(NUMBER.pack(os.waitpid(last, 0)[1]))
            continue
        parent = os.getpid()
        last = os.fork()
        if last == 0:
            control.close()
            die_with_parent(parent)
            run(Connection(descriptors[0]))
            os._exit(0)
        os.close(descriptors[0])
        control.send(NUMBER.pack(last))


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = socket.socket(fileno=int(sys.argv[1]))
    warm_up()
    serve(link)
