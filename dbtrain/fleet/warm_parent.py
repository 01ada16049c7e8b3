"""The warm parents of trainers: a machine's has imported everything and forks one a worker, which forks trainers.

Importing torch, diffusers and deepspeed takes many seconds, forking takes milliseconds. So a killed trainer, worker or
warm parent of a worker costs no more than the time to load the base. A warm parent has no threads and has not touched a
GPU, which makes the fork safe. A worker's dies with its worker, and its trainers with it; a machine's dies with the
driver that started it, or `LINGER_S` after the last worker. The machine's is found by an abstract socket of a random
name, which both ends take only from a process of the same user.

Requests of a worker over its socket: first its environment and a descriptor of its log, which forks its warm parent and
is answered by the pid; then `f` with a descriptor answers the pid of a new trainer, whose pipe that descriptor is; `w`
waits for the last trainer and answers its wait status.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from dbtrain.fleet.processes import die_with_parent

NUMBER = struct.Struct("q")
PEER = struct.Struct("3i")
"""pid, uid and gid of a socket's other end, as SO_PEERCRED gives them."""
MOST = 2**20
"""Bytes of an environment."""
START_S = 120.0
"""Seconds for the machine's warm parent to take connections. It does so before it imports anything, but a machine may
have more work than cores."""
ANSWER_S = 30.0
"""Seconds for a process to say or do what it does at once."""
LINGER_S = 10.0


class WarmParent:
    """The worker's end of its own warm parent. host: the name of the machine's, which is started if there is none.
    Raises whatever keeps it from starting."""

    def __init__(self, log: Path, host: str):
        self.pid = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self.control = connect(host, log)
            try:
                socket.send_fds(self.control, [json.dumps(dict(os.environ)).encode()], [file.fileno()])
            except BaseException:
                self.control.close()
                raise

    def fork(self, descriptor: int) -> int:
        """The pid of a new trainer that owns a copy of the descriptor. OSError if the warm parent is dead."""
        socket.send_fds(self.control, [b"f"], [descriptor])
        if not self.pid:
            self.pid = self._number()
            self.handle = os.pidfd_open(self.pid)
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
        """Kill the warm parent, and its trainers with it; before it was forked, the machine's that does not fork it."""
        try:
            if self.pid:
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            else:
                os.kill(peer(self.control)[0], signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        """Kill the warm parent and let go of it."""
        if self.pid:
            self.kill()
            select.select([self.handle], [], [], ANSWER_S)
            os.close(self.handle)
            self.pid = 0
        self.control.close()


def new_name() -> str:
    """A name for a machine's warm parent that nobody guesses."""
    return f"dbtrain-{secrets.token_hex(16)}"


def peer(link: socket.socket) -> tuple[int, int]:
    """pid and uid of a socket's other end."""
    return PEER.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))[:2]


def connect(host: str, log: Path) -> socket.socket:
    """A socket to the machine's warm parent of this name. OSError if there is none and none can be started."""
    process, until = None, time.monotonic() + START_S
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            link.connect(f"\0{host}")
            if peer(link)[1] != os.getuid():
                raise PermissionError(f"the socket {host} is another user's")
            return link
        except ConnectionRefusedError:
            link.close()
        except BaseException:
            link.close()
            raise
        if (process is not None and process.poll()) or time.monotonic() > until:
            raise ConnectionResetError(f"the machine's warm parent does not start; see {log}")
        if process is None or process.poll() == 0:  # another worker's was there first, and is gone now
            process = start_host(host, log)
        time.sleep(0.02)


def start_host(host: str, log: Path, parent: int = 0, **variables: str) -> subprocess.Popen:
    """Start the machine's warm parent. parent: the process that it dies with; 0: it ends by itself."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # torch then counts GPUs by NVML and does not start CUDA, which would not survive a fork.
    environment = {**variables, **os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    paths = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    command = [sys.executable, "-m", "dbtrain.fleet.warm_parent", host, str(parent)]
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def warm_up() -> None:
    """Import everything that training needs."""
    import dbtrain.fleet.work  # noqa: F401
    from dbtrain.engines.zero import zero_keys
    from dbtrain.families import FAMILIES
    from dbtrain.models.architectures import class_of
    from dbtrain.models.load import quiet_libraries

    zero_keys()
    quiet_libraries()
    for name in {name for family in FAMILIES.values() for names in family.components.values() for name in names}:
        class_of(name)


@contextmanager
def hosting(log: Path, cpus: float) -> Iterator[str]:
    """The name of a warm parent of this machine that dies with this process. It imports beside whatever comes next.
    cpus: of each worker."""
    name, process = new_name(), None
    with suppress(OSError):  # workers try it again, and tell why it fails
        process = start_host(name, log, os.getpid(), OMP_NUM_THREADS=str(max(1, int(cpus))))
    try:
        yield name
    finally:
        if process is not None:
            process.kill()
            process.wait()


class Child(NamedTuple):
    """A worker's warm parent, as the machine's sees it."""

    pid: int
    handle: int
    control: socket.socket


def host(listener: socket.socket, lingers: bool) -> None:
    """Fork a warm parent for each worker that connects, and kill it when its worker is gone, also while it is stopped.
    lingers: whether to end `LINGER_S` after the last."""
    children: dict[int, Child] = {}
    """By the descriptor of its pidfd, and of its socket."""
    events, busy = select.poll(), time.monotonic()
    events.register(listener, select.POLLIN)
    while True:
        for descriptor, _ in events.poll(1000):
            if descriptor == listener.fileno():
                if new := fork_child(listener, children):
                    for number in (new.handle, new.control.fileno()):
                        children[number] = new
                        events.register(number, select.POLLIN if number == new.handle else 0)
            elif descriptor in children:
                child = children[descriptor]
                for number in (child.handle, child.control.fileno()):
                    events.unregister(number)
                    del children[number]
                signal.pidfd_send_signal(child.handle, signal.SIGKILL)  # a zombie until the next line
                os.waitpid(child.pid, 0)
                os.close(child.handle)
                child.control.close()
        if children:
            busy = time.monotonic()
        elif lingers and time.monotonic() - busy > LINGER_S:
            return


def fork_child(listener: socket.socket, others: Collection[int]) -> Child | None:
    """The warm parent of a worker that connects now; None if it is none of ours, or gone already. others: descriptors
    that it closes, so that each worker sees the death of its own."""
    control, _ = listener.accept()
    control.settimeout(ANSWER_S)
    try:
        message, descriptors, _, _ = socket.recv_fds(control, MOST, 1) if peer(control)[1] == os.getuid() else 4 * [b""]
    except OSError:
        message, descriptors = b"", []
    if not message:
        control.close()
        return None
    pid = os.fork()
    if pid == 0:
        try:
            for descriptor in (listener.detach(), *others):
                os.close(descriptor)
            control.settimeout(None)
            begin(json.loads(message), descriptors[0])
            control.send(NUMBER.pack(os.getpid()))
            serve(control)
        finally:
            os._exit(0)
    os.close(descriptors[0])
    return Child(pid, os.pidfd_open(pid), control)


def begin(environment: dict[str, str], log: int) -> None:
    """Take on a worker's environment, in which Ray says which GPUs are its own, and its log.

    OMP_NUM_THREADS was read when torch was imported, so the machine's warm parent has it as its workers have it.
    """
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


def serve(control: socket.socket) -> None:
    """Fork a trainer for each `f` and reap it for `w`, until the worker is gone."""
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


def main(name: str, parent: int) -> None:
    """Be a machine's warm parent, unless another of that name is there. parent: the process to die with; 0: none."""
    if parent:
        die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            listener.bind(f"\0{name}")
        except OSError:
            return
        listener.listen(socket.SOMAXCONN)
        warm_up()
        host(listener, not parent)
    os._exit(0)  # nothing that was imported has anything to tidy


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
