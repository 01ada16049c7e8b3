"""What a trainer does: load the base once, then one unit after another until it is told to stop or dies.

It runs in a process of its own, forked by the zygote, so that whatever a subject does to it (a crash, a deadlock, all
memory) ends with that process. It speaks with its worker over a pipe; every message but `beat` is listed in `Message`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbtrain.batch import Subject
from dbtrain.config import RunConfig
from dbtrain.errors import DbtrainError, EngineError, SubjectTaken
from dbtrain.fleet.schedule import WorkUnit

if TYPE_CHECKING:
    from dbtrain.data.index import Row

Message = tuple
"""("ready", base digest) | ("beat", stage) | ("finished", number, position, id, seconds) |
("failed", number, position, cause, reason, seconds) | ("after", number, position, outcome) |
("done", number, seconds) | ("gone", cause, reason). `number` is the order's."""

BEAT_S = 0.2
"""Shortest time between two messages that say no more than that the trainer lives."""
STOPPED = 75
FAILED = 70


@dataclass(frozen=True)
class Task:
    """What a trainer is started with. environment: its place in a gang, for torch.distributed."""

    config: dict[str, Any]
    out: str
    slots: int = 1
    after: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """A unit with all that its work needs. specs: a subject's fields by name, `identifier` being the allocated one."""

    number: int
    unit: WorkUnit
    specs: tuple[dict[str, Any], ...] = ()
    rows: tuple[Row, ...] = ()


class Charges:
    """Seconds charged to each subject of a unit: the time passed is shared by those that train at the moment.

    Of the subjects that have not ended, the first `slots` in order are taken to train; the charges sum to the whole.
    """

    def __init__(self, ids: Sequence[str], slots: int):
        self.open, self.slots, self.last = dict.fromkeys(ids, 0.0), slots, time.monotonic()

    def end(self, subject: str) -> float:
        """What a subject that ends now has cost."""
        now = time.monotonic()
        training = list(self.open)[: self.slots]
        for name in training:
            self.open[name] += (now - self.last) / len(training)
        self.last = now
        return self.open.pop(subject, 0.0)


def run(link: Connection) -> None:
    """A trainer's whole life. It leaves with exit code 75 after a stop request and 70 after a failure it reported."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    task: Task = link.recv()
    os.environ.update(task.environment)
    code = 0
    try:
        _serve(link, task)
    except EOFError:
        pass
    except BaseException as error:
        traceback.print_exc()
        cause, reason = explain(error)
        code = STOPPED if cause == "stopped" else FAILED
        _last_word(link, ("gone", cause, reason))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through atexit: a gang's process group would wait there for members that are dead.
    os._exit(code)


def _last_word(link: Connection, message: Message) -> None:
    with contextlib.suppress(OSError):
        link.send(message)


def explain(error: BaseException) -> tuple[str, str]:
    """(cause, reason) of an error that ended a trainer's work; the causes are those of `schedule.CAUSES`."""
    import torch

    text = " ".join(str(error).split())
    if getattr(error, "exit_code", None) == STOPPED:
        return "stopped", text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in text.lower() for sign in ("out of memory", "can't allocate memory", "not enough memory")
    ):
        return "oom", text[:500] or "memory ran out"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return "disk", text
    if isinstance(error, SubjectTaken):
        return "lost", text  # the worker that had it is not known to be dead
    if isinstance(error, DbtrainError):
        return "error", text[:2000]
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({Path(where[0].filename).name}:{where[0].lineno})" if where else ""
    return "error", f"{type(error).__name__}: {text[:1000]}{place}"


def _serve(link: Connection, task: Task) -> None:
    from dbtrain.families.load import base_digest
    from dbtrain.session import join_session
    from dbtrain.train import StopRequested

    say = _speech(link)
    session = join_session(RunConfig.model_validate(task.config), Path(task.out), True, _beat(say))
    say(("ready", base_digest(session.models)))
    while True:
        while not link.poll(0.2):
            if session.stop:
                raise StopRequested("stopped on request between units")
        order: Order = pickle.loads(link.recv_bytes())  # noqa: S301 - from our own driver
        start = time.monotonic()
        WORK[order.unit.kind](session, task, order, say)
        say(("done", order.number, time.monotonic() - start))


def _speech(link: Connection) -> Callable[[Message], None]:
    """A way to send from several threads: an engine may tell its stages from a thread that writes."""
    lock = threading.Lock()

    def say(message: Message) -> None:
        with lock:
            link.send(message)

    return say


def _beat(say: Callable[[Message], None]) -> Callable[[str], None]:
    last = 0.0

    def beat(stage: str) -> None:
        nonlocal last
        if time.monotonic() - last > BEAT_S:
            last = time.monotonic()
            say(("beat", stage))

    return beat


def train(session: Any, task: Task, order: Order, send: Callable[[Message], None]) -> None:
    """Train a unit's subjects, fewer together where memory ran out before; tell of each as it ends."""
    from dbtrain.data.index import Index
    from dbtrain.train import train_subjects

    subjects = [to_subject(spec) for spec in order.specs]
    session.identifiers = {spec["id"]: spec["identifier"] for spec in order.specs}
    session.index = Index(order.rows, ())
    places = {subject.id: place for subject, place in zip(subjects, order.unit.positions)}
    charges = Charges(list(places), min(task.slots, order.unit.pack))

    def finished(subject: Subject, outcome: dict[str, Any] | EngineError) -> None:
        seconds = charges.end(subject.id) * session.world.size
        if not session.world.first:
            return
        if isinstance(outcome, Exception):
            cause, reason = explain(outcome)
            send(("failed", order.number, places[subject.id], cause, reason, seconds))
        else:
            send(("finished", order.number, places[subject.id], subject.id, seconds))

    engine = session.config.engine
    if order.unit.pack < task.slots:
        smaller = engine.packed.model_copy(update={"size": order.unit.pack})
        session.config = session.config.model_copy(update={"engine": engine.model_copy(update={"packed": smaller})})
    try:
        train_subjects(session, subjects, finished)
    finally:
        session.config = session.config.model_copy(update={"engine": engine})


def to_subject(spec: dict[str, Any]) -> Subject:
    """A subject as training needs it: its photos are in the shards."""
    return Subject(images=(), **{key: value for key, value in spec.items() if key != "identifier"})


def draw_priors(session: Any, task: Task, order: Order, send: Callable[[Message], None]) -> None:
    """Draw this unit's part of a class's priors; a gang's members share it among themselves."""
    from dbtrain.engines.engine import World
    from dbtrain.generate import sampling_mode
    from dbtrain.priors import make_priors, prior_key

    config, unit, world = session.config, order.unit, session.world
    store = Path(config.prior.store) if config.prior.store else session.out / "priors"
    if world.size == 1:
        world = World(unit.part, unit.parts, world.device)
    key = prior_key(config, session.models, unit.class_noun)
    with sampling_mode(session.models):
        say, beat = session.beat, lambda: session.beat("prior")
        make_priors(
            store, key, config.prior.images, session.family, session.models, world, config.prior.batch, say, beat=beat
        )


def draw_and_score(session: Any, task: Task, order: Order, send: Callable[[Message], None]) -> None:
    """Generate and evaluate for finished subjects; what fails is told and holds nobody up."""
    from dbtrain.fleet.afterwards import AFTER

    for spec, position in zip(order.specs, order.unit.positions):
        try:
            for name in task.after:
                session.beat(name)
                AFTER[name](session, session.out / "subjects" / spec["id"])
            outcome = "done"
        except (DbtrainError, ValueError, RuntimeError) as error:
            outcome = explain(error)[1]
        send(("after", order.number, position, outcome))


WORK = {"train": train, "prior": draw_priors, "after": draw_and_score}
"""What a trainer does for each kind of unit."""
