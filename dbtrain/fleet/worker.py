"""A worker: a light process that keeps a trainer going, tells what becomes of its units, and finds it dead or hung.

The driver runs it as a Ray actor, one for each GPU or CPU slot. It knows nothing of Ray, so tests run it as it is.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError, disk_trouble
from dbtrain.fleet.processes import kill
from dbtrain.fleet.trainer import STOPPED, Message, Task
from dbtrain.fleet.zygote import Zygote
from dbtrain.record import drop_record, finished_record

START_SHARE = 10
"""A trainer that loads the base may be silent this many times longer than one that trains."""


class Worker:
    """Keeps one trainer. `poll` is called by one thread at a time; the other methods may be called beside it.

    Calls may run in another order than they were sent in, as an actor's do on several threads. So `start`,
    `halt` and `give` name a generation, and none disturbs what a later one did.
    """

    def __init__(self, name: str, out: str, hang_s: float):
        self.name, self.out, self.hang_s = name, Path(out), hang_s
        self.zygote: Zygote | None = None
        self.link: Connection | None = None
        self.trainer = self.generation = self.least = self.killed_before = 0
        self.limit_s: float | None = None
        self.heard, self.stage = time.monotonic(), "start"
        self.word: tuple[str, str] | None = None
        self.lock = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """Where this worker is."""
        return {"host": socket.gethostname(), "pid": os.getpid()}

    def free_port(self) -> int:
        """A port that a gang's first member may listen on."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def start(self, task: Task, generation: int) -> int:
        """The pid of a fresh trainer that begins to load the base; a former one is killed. Its events bear the
        generation's number. A generation that is over or there already changes nothing."""
        with self.lock:
            if generation < self.least or generation <= self.generation:
                return self.trainer
            self._halt()
            if self.zygote is None:
                self.zygote = Zygote(self.out / "logs" / f"{self.name}.log")
            self.generation, self.word, self.trainer, self.killed_before = generation, None, 0, oom_kills()
            self.heard, self.limit_s, self.stage = time.monotonic(), START_SHARE * self.hang_s, "start"
            # Last, because `poll` takes the generation of the link that it sees.
            self.link, theirs = Pipe()
            try:
                self.trainer = self.zygote.fork(theirs.fileno())
                self.link.send(task)
            except OSError:
                # The warm parent was killed: the pipe's end tells `poll`, as with any dead trainer.
                self.zygote.close()
                self.zygote = None
            finally:
                theirs.close()
            return self.trainer

    def give(self, order: bytes, generation: int) -> None:
        """Hand the trainer of a generation an order, pickled: unpacking it here would load what its parts come from.
        A dead trainer shows in `poll`; one that followed it never sees the order."""
        with self.lock:
            if generation != self.generation:
                return
            self.heard, self.limit_s = time.monotonic(), self.hang_s
            try:
                if self.link is not None:
                    self.link.send_bytes(order)
            except OSError:
                pass

    def poll(self, wait_s: float) -> tuple[int, list[Message]]:
        """(generation, what happened since the last call), after at most `wait_s` seconds.

        Messages as in `trainer.Message`, without `beat`; `finished` ends in the published result instead of seconds;
        ("died", cause, reason) is the last one of a generation.
        """
        deadline = time.monotonic() + wait_s
        events: list[Message] = []
        generation = self.generation
        while not events and time.monotonic() < deadline:
            link, generation = self.link, self.generation
            # Both are of one trainer only if that is still there: `start` changes the second while there is none.
            if link is None or link is not self.link:
                time.sleep(min(0.05, wait_s))
                continue
            try:
                while link.poll(0 if events else max(0.0, min(0.5, deadline - time.monotonic()))):
                    events += self._hear(link.recv())
                events += self._check_limit()
            except (EOFError, OSError):
                events += self._bury(link)
        return generation, events

    def _hear(self, message: Message) -> list[Message]:
        self.heard = time.monotonic()
        kind = message[0]
        if kind == "beat":
            self.stage = message[1]
            return []
        if kind == "gone":
            self.word = message[1], message[2]
            return []
        if kind in ("ready", "done"):
            self.limit_s = None
        return [self._checked(*message[1:])] if kind == "finished" else [message]

    def _checked(self, number: int, position: int, subject: str, seconds: float) -> Message:
        """What a trainer published, if it is on the disk as its record says."""
        try:
            return ("finished", number, position, {**read_result(self.out, subject), "gpu_seconds": seconds})
        except (OSError, DataError, KeyError) as error:
            trouble = disk_trouble(error, paths=False)
            what = trouble or f"published files do not verify: {error}"
            return ("failed", number, position, "disk" if trouble else "error", what, seconds)

    def _check_limit(self) -> list[Message]:
        silent = time.monotonic() - self.heard
        if self.limit_s is None or silent < self.limit_s:
            return []
        self.word = "hang", f"no step for {silent:.1f} s in stage {self.stage}"
        if self.trainer:
            kill(self.trainer)
        elif self.zygote is not None:
            self.zygote.kill()
        return []

    def _bury(self, link: Connection) -> list[Message]:
        with self.lock:
            if link is not self.link:
                return []
            self.link = None
            self.limit_s = None
            return [("died", *self._cause())]

    def _cause(self) -> tuple[str, str]:
        try:
            if self.zygote is None:
                raise ConnectionResetError
            status = self.zygote.wait()
        except OSError:
            if self.zygote is not None:
                self.zygote.close()
            self.zygote = None
            return "killed", "its warm parent was killed"
        if self.word is not None:
            return self.word
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGKILL and oom_kills() > self.killed_before:
                return "oom", "the kernel killed it for memory"
            return ("killed" if number == signal.SIGKILL else "crash"), f"died of {signal.Signals(number).name}"
        code = os.WEXITSTATUS(status)
        return ("stopped" if code == STOPPED else "crash"), f"left with exit code {code}"

    def halt(self, generation: int) -> None:
        """Kill a trainer older than this generation, and let none begin; `poll` has no more of it to tell."""
        with self.lock:
            self.least = max(self.least, generation)
            if self.generation < generation:
                self._halt()

    def _halt(self) -> None:
        if self.link is None:
            return
        if self.trainer:
            kill(self.trainer)
        # Not closed here: `poll` may be waiting on it.
        self.link = self.limit_s = None
        self._cause()
        self.trainer = 0

    def ask_stop(self) -> None:
        """Ask the trainer to finish its step, checkpoint and leave."""
        with self.lock:
            if self.link is not None and self.trainer:
                os.kill(self.trainer, signal.SIGTERM)


def read_result(out: Path, subject: str) -> dict[str, Any]:
    """A finished subject's run digest, file digests and stage times.

    Raises DataError unless every file has its digest; the record is removed then, so that the next attempt does not
    take the subject for finished, as it would where the files are too large to be read each time.
    """
    folder = out / "subjects" / subject
    try:
        record = finished_record(folder)
    except DataError:
        drop_record(folder)
        raise
    return {key: record[key] for key in ("run", "files", "stages_s")}


def oom_kills() -> int:
    """How many processes the kernel has killed for memory, as far as this machine tells."""
    count = 0
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        count += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return count
