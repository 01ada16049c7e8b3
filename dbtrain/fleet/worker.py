"""A worker: a light process that keeps a trainer going, sends on its messages, and finds it dead or hung.

The driver runs it as a Ray actor, one for each GPU or CPU slot. This module imports no Ray, so tests run it as it is.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError
from dbtrain.fleet.causes import BLAMED, End, refusal
from dbtrain.fleet.messages import Beat, Died, Failed, Finished, Leaving, Message, Published, Ready, Task, UnitDone
from dbtrain.fleet.processes import kill
from dbtrain.fleet.run_folder import cause_of, trouble_of
from dbtrain.fleet.trainer import STOPPED
from dbtrain.fleet.warm_parent import WarmParent, new_name
from dbtrain.machine import oom_kills
from dbtrain.results.record import drop_record, finished_record, stage_seconds

START_SHARE = 10
"""A trainer that loads the base may be silent this many times longer than one that trains."""


class Worker:
    """Keeps one trainer. `poll` is called by one thread at a time; the other methods may be called beside it.

    Calls may run in another order than they were sent in, as an actor's do on several threads. So `start`, `halt` and
    `give` name a generation, and a call of an old generation changes nothing of a newer one.

    parent         process that trainers are forked from; None before the first, and where it died or cannot start
    link           pipe to the trainer; None while there is no trainer
    trainer        the trainer's pid; 0 where none could be forked
    generation     number of the newest trainer that `start` made
    least          lowest generation that may still start; `halt` raises it
    heard, stage   when the trainer's last message came, and the stage that it named
    limit_s        seconds that the trainer may be silent; None while it has nothing to do
    end            why the trainer ends, where that is known before it is dead
    killed_before  `oom_kills()` when the trainer was last given work; if it is more after a death by SIGKILL, the
                   kernel killed the trainer for memory
    token          what DIR/fleet.token must hold, else DIR is not mounted here
    host           name of the machine's warm parent, which forks this worker's
    lock           held while link, trainer and generation change
    """

    def __init__(self, name: str, out: str, hang_s: float, host: str = ""):
        self.name, self.out, self.hang_s, self.host = name, Path(out), hang_s, host or new_name()
        self.parent: WarmParent | None = None
        self.link: Connection | None = None
        self.trainer = self.generation = self.least = self.killed_before = 0
        self.limit_s: float | None = None
        self.heard, self.stage = time.monotonic(), "start"
        self.end: End | None = None
        self.token = ""
        self.lock = threading.Lock()

    def free_port(self) -> int:
        """A port that a gang's first member may listen on."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def start(self, task: Task, generation: int) -> int:
        """The pid of a fresh trainer that begins to load the base; a former one is killed. Its messages bear the
        generation's number. Ignored if that generation was halted or has started."""
        with self.lock:
            if generation < self.least or generation <= self.generation:
                return self.trainer
            self._halt()
            self.token = task.token
            self.generation, self.end, self.trainer, self.killed_before = generation, self._warm(), 0, oom_kills()
            self.heard, self.limit_s, self.stage = time.monotonic(), START_SHARE * self.hang_s, "start"
            # Last, because `poll` takes the generation of the link that it sees.
            self.link, theirs = Pipe()
            # Where nothing can start or the warm parent was killed, `poll` sees the pipe's end, as with any dead
            # trainer.
            try:
                if self.parent is not None and self.end is None:
                    self.trainer = self.parent.fork(theirs.fileno())
                    self.link.send(task)
            except OSError:
                self._cool()
            finally:
                theirs.close()
            return self.trainer

    def _warm(self) -> End | None:
        """Why no trainer can start here; None if there is a warm parent now."""
        if trouble := trouble_of(self.out, self.token):
            return End(cause_of(trouble), trouble)
        try:
            self.parent = self.parent or WarmParent(self.out / "logs" / f"{self.name}.log", self.host)
        except Exception as error:
            return refusal(error) or End("error", f"{type(error).__name__}: {error}")
        return None

    def _cool(self) -> None:
        """Let go of a warm parent that is dead or of no use."""
        if self.parent is not None:
            self.parent.close()
        self.parent = None

    def give(self, order: bytes, generation: int) -> None:
        """Send the trainer of a generation an order. Kept pickled, because unpickling would import the data modules.
        The death of that trainer shows in `poll`, and the next trainer never gets this order."""
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
        """(generation, the messages since the last call), after at most `wait_s` seconds."""
        deadline = time.monotonic() + wait_s
        messages: list[Message] = []
        generation = self.generation
        while not messages and time.monotonic() < deadline:
            link, generation = self.link, self.generation
            # Link and generation are of the same trainer only if the link is still there: `start` changes the
            # generation while there is no link.
            if link is None or link is not self.link:
                time.sleep(min(0.05, wait_s))
                continue
            try:
                while link.poll(0 if messages else max(0.0, min(0.5, deadline - time.monotonic()))):
                    messages += self._hear(link.recv())
                self._check_limit()
            except (EOFError, OSError):
                messages += self._bury(link)
        return generation, messages

    def _hear(self, message: Message | Beat | Leaving | Published) -> list[Message]:
        """A trainer's message for the driver; files verified, cause corrected if the disk is at fault."""
        self.heard = time.monotonic()
        match message:
            case Beat(stage):
                self.stage = stage
                return []
            case Leaving(end):
                self.end = end
                return []
            case Ready() | UnitDone():
                self.limit_s = None
            case Published():
                message = self._checked(message)
        return [replace(message, end=self._weighed(message.end)) if isinstance(message, Failed) else message]

    def _checked(self, published: Published) -> Finished | Failed:
        """`Finished` if what a trainer published is on the disk as its record says, else `Failed`."""
        number, position, seconds = published.number, published.position, published.seconds
        try:
            return Finished(number, position, {**read_result(self.out, published.subject), "gpu_seconds": seconds})
        except (OSError, DataError, KeyError) as error:
            end = refusal(error) or End("error", f"published files do not verify: {error}")
            return Failed(number, position, end, seconds)

    def _weighed(self, end: End) -> End:
        """The end after a look at the run's folder. Where the folder is missing, or takes no file though one was
        refused, the cause is the disk and nobody is to blame."""
        trouble = trouble_of(self.out, self.token, write=end.cause == "file") if BLAMED[end.cause] else None
        if trouble is not None:
            return End(cause_of(trouble), trouble)
        return replace(end, reason=f"{end.reason}; {self.out} itself works") if end.cause == "file" else end

    def _check_limit(self) -> None:
        """Kill a trainer that was silent for too long."""
        silent = time.monotonic() - self.heard
        if self.limit_s is None or silent < self.limit_s:
            return
        self.end = End("hang", f"no step for {silent:.1f} s in stage {self.stage}")
        if self.trainer:
            kill(self.trainer)
        elif self.parent is not None:
            self.parent.kill()

    def _bury(self, link: Connection) -> list[Message]:
        """`Died` of the trainer whose pipe has closed; nothing if `start` or `halt` has dealt with it already."""
        with self.lock:
            if link is not self.link:
                return []
            self.link = None
            self.limit_s = None
            end = self._reap()
        return [Died(self._weighed(end))]

    def _reap(self) -> End:
        """The end of a trainer that is dead or dying, by what it said or by its wait status."""
        try:
            if self.parent is None or not self.trainer:
                raise ConnectionResetError
            status = self.parent.wait()
        except OSError:
            self._cool()
            return self.end or End("killed", "its warm parent was killed")
        if self.end is not None:
            return self.end
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGKILL and oom_kills() > self.killed_before:
                return End("oom", "the kernel killed it for memory")
            return End("killed" if number == signal.SIGKILL else "crash", f"died of {signal.Signals(number).name}")
        code = os.WEXITSTATUS(status)
        return End("stopped" if code == STOPPED else "crash", f"left with exit code {code}")

    def halt(self, generation: int) -> None:
        """Kill a trainer older than this generation, and let none begin; `poll` gives no more messages of it."""
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
        self._reap()
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
    return {"run": record["run"], "files": record["files"], "stages_s": stage_seconds(record)}
