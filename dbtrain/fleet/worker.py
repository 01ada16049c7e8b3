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

from dbtrain.errors import DataError
from dbtrain.fleet.folder import refusal, trouble_of
from dbtrain.fleet.processes import kill
from dbtrain.fleet.schedule import BLAMED
from dbtrain.fleet.trainer import STOPPED, Message, Task
from dbtrain.fleet.zygote import Zygote
from dbtrain.machine import oom_kills
from dbtrain.results.record import drop_record, finished_record

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
        self.token = ""
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
            self.token = task.token
            self.generation, self.word, self.trainer, self.killed_before = generation, self._warm(), 0, oom_kills()
            self.heard, self.limit_s, self.stage = time.monotonic(), START_SHARE * self.hang_s, "start"
            # Last, because `poll` takes the generation of the link that it sees.
            self.link, theirs = Pipe()
            # Where nothing can start or the warm parent was killed, the pipe's end tells `poll`, as with any dead
            # trainer.
            try:
                if self.zygote is not None and self.word is None:
                    self.trainer = self.zygote.fork(theirs.fileno())
                    self.link.send(task)
            except OSError:
                self._cool()
            finally:
                theirs.close()
            return self.trainer

    def _warm(self) -> tuple[str, str] | None:
        """(cause, reason) of no trainer, if none can start here; None if there is a warm parent now."""
        if trouble := trouble_of(self.out, self.token):
            return "disk", trouble
        try:
            self.zygote = self.zygote or Zygote(self.out / "logs" / f"{self.name}.log")
        except Exception as error:
            return refusal(error) or ("error", f"{type(error).__name__}: {error}")
        return None

    def _cool(self) -> None:
        """Let go of the warm parent, which is dead or of no use."""
        if self.zygote is not None:
            self.zygote.close()
        self.zygote = None

    def give(self, order: bytes, generation: int) -> None:
        """Hand the trainer of a generation an order, pickled: unpacking it here would load what its parts come from.
        A dead trainer shows in `poll`; one that followed it never sees the order."""
        with self.lock:
            if generation != self.generation:
                return
            self.heard, self.limit_s, self.killed_before = time.monotonic(), self.hang_s, oom_kills()
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
        told = self._checked(*message[1:]) if kind == "finished" else message
        return [(*told[:3], *self._weighed(*told[3:5]), *told[5:]) if told[0] == "failed" else told]

    def _checked(self, number: int, position: int, subject: str, seconds: float) -> Message:
        """What a trainer published, if it is on the disk as its record says."""
        try:
            return ("finished", number, position, {**read_result(self.out, subject), "gpu_seconds": seconds})
        except (OSError, DataError, KeyError) as error:
            end = refusal(error) or ("error", f"published files do not verify: {error}")
            return ("failed", number, position, *end, seconds)

    def _weighed(self, cause: str, reason: str) -> tuple[str, str]:
        """(cause, reason) of an end after a look at the run's folder: where that is not there, or takes no file though
        one was refused, nobody is to blame."""
        trouble = trouble_of(self.out, self.token, write=cause == "file") if BLAMED[cause] else None
        if trouble is None:
            return cause, f"{reason}; {self.out} itself works" if cause == "file" else reason
        return "disk", trouble

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
            end = self._cause()
        return [("died", *self._weighed(*end))]

    def _cause(self) -> tuple[str, str]:
        try:
            if self.zygote is None or not self.trainer:
                raise ConnectionResetError
            status = self.zygote.wait()
        except OSError:
            self._cool()
            return self.word or ("killed", "its warm parent was killed")
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
