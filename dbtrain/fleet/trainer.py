"""What a trainer does: load the base once, then one unit after another until it is told to stop or dies.

It runs in a process of its own, forked by the zygote, so that whatever a subject does to it (a crash, a deadlock, all
memory) ends with that process. It speaks with its worker over a pipe; every message but `beat` is listed in `Message`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbtrain.errors import DbtrainError, StopRequested, SubjectTaken
from dbtrain.fleet.folder import refusal
from dbtrain.fleet.schedule import BLAMED, WorkUnit
from dbtrain.settings.config import RunConfig
from dbtrain.storage.trouble import out_of_memory
from dbtrain.values import Subject

if TYPE_CHECKING:
    from dbtrain.data.index import Entry
    from dbtrain.training.session import Base, Watch

Message = tuple
"""("ready", base digest) | ("beat", stage) | ("finished", number, position, id, seconds) |
("failed", number, position, cause, reason, seconds) | ("after", number, position, name, outcome) |
("packed", number, size) | ("done", number, seconds) | ("gone", cause, reason). `number` is the order's."""

BEAT_S = 0.2
"""Shortest time between two messages that say no more than that the trainer lives."""
STOPPED = 75
FAILED = 70
PEER_SIGNS = ("closed by peer", "reset by peer", "broken pipe", "failed to recv", "remote process exited", "nccl error")
"""What gloo, NCCL and torch's store say, in small letters, when another process of the gang went away."""
DEVICE_SIGNS = ("cuda error", "cublas_status", "cudnn_status", "cusolver_status", "cufft_", "nvrtc error",
                "uncorrectable ecc", "illegal memory access", "unspecified launch failure")  # fmt: skip
"""What CUDA and its libraries say, in small letters, when a GPU or its driver failed."""
PROGRAM_SIGNS = ("device-side assert", "invalid argument", "invalid_value", "invalid configuration", "not_supported")
"""What they say when the work that they were given is wrong, which is wrong on any GPU."""


@dataclass(frozen=True)
class Task:
    """What a trainer is started with. evaluation: fields of `evaluate.protocol.Settings`. environment: its place in a
    gang, for torch.distributed. token: what proves that a folder is the run's (`folder.mark`)."""

    config: dict[str, Any]
    out: str
    slots: int = 1
    evaluation: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    token: str = ""


@dataclass(frozen=True)
class Order:
    """A unit with all that its work needs. specs: a subject's fields by name, `identifier` being the allocated one.
    after: for each subject, what is to be done with it, by its names in `afterwards.AFTER`."""

    number: int
    unit: WorkUnit
    specs: tuple[dict[str, Any], ...] = ()
    rows: tuple[Entry, ...] = ()
    after: tuple[tuple[str, ...], ...] = ()


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
    """(cause, reason) of an error that ended a trainer's work; the causes are those of `schedule.BLAMED`."""
    text = " ".join(str(error).split())
    if getattr(error, "exit_code", None) == STOPPED:
        return "stopped", text
    if out_of_memory(error):
        return "oom", text[:500] or "memory ran out"
    if end := refusal(error):
        return end
    if isinstance(error, SubjectTaken):
        return "lost", text  # the worker that had it is not known to be dead
    if isinstance(error, DbtrainError):
        return "error", text[:2000]
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({Path(where[0].filename).name}:{where[0].lineno})" if where else ""
    return _outside(error, text.lower()) or "error", f"{type(error).__name__}: {text[:1000]}{place}"


def _outside(error: BaseException, text: str) -> str | None:
    """The cause of an error that came from outside: from another member of the gang, or from the GPU; else None."""
    import torch

    if any(sign in text for sign in PEER_SIGNS):
        return "lost"
    device = isinstance(error, getattr(torch, "AcceleratorError", ())) or any(sign in text for sign in DEVICE_SIGNS)
    return "device" if device and not any(sign in text for sign in PROGRAM_SIGNS) else None


def _serve(link: Connection, task: Task) -> None:
    from dbtrain.models.load import base_digest
    from dbtrain.training.session import Watch, join_run

    say = _speech(link)
    watch = Watch(quiet=True, beat=_beat(say))
    base = join_run(RunConfig.model_validate(task.config), watch)
    say(("ready", base_digest(base.models)))
    while True:
        while not link.poll(0.2):
            if watch.stop.asked:
                raise StopRequested("stopped on request between units")
        order: Order = pickle.loads(link.recv_bytes())  # noqa: S301 - from our own driver
        start = time.monotonic()
        WORK[order.unit.kind](base, watch, task, order, say)
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


def train(base: Base, watch: Watch, task: Task, order: Order, send: Callable[[Message], None]) -> None:
    """Train a unit's subjects, fewer together where memory ran out before; tell of each as it ends."""
    from dataclasses import replace

    from dbtrain.data.index import Index
    from dbtrain.train import train_subjects
    from dbtrain.training.session import Work

    subjects = [to_subject(spec) for spec in order.specs]
    identifiers = {spec["id"]: spec["identifier"] for spec in order.specs}
    places = {subject.id: place for subject, place in zip(subjects, order.unit.positions)}
    charges = Charges(list(places), order.unit.pack)

    def finished(subject: Subject, outcome: dict[str, Any] | DbtrainError) -> None:
        seconds = charges.end(subject.id) * base.world.size
        if not base.world.first:
            return
        if isinstance(outcome, Exception):
            cause, reason = explain(outcome)
            send(("failed", order.number, places[subject.id], cause, reason, seconds))
        else:
            send(("finished", order.number, places[subject.id], subject.id, seconds))

    engine = base.settings.engine
    size = order.unit.pack if order.unit.pack < task.slots else engine.packed.size
    if engine.kind == "packed" and size == "auto":
        size = measured(base, watch, subjects)
        charges.slots = min(order.unit.pack, size)
        send(("packed", order.number, size))
    packed = engine.packed.model_copy(update={"size": size})
    settings = base.settings.model_copy(update={"engine": engine.model_copy(update={"packed": packed})})
    work = Work.under(Path(task.out), settings, subjects, identifiers, Index(order.rows, ()))
    train_subjects(replace(base, settings=settings), work, watch, finished)


def measured(base: Base, watch: Watch, subjects: Sequence[Subject]) -> int:
    """What `engine.packed.size: auto` comes to for a unit's subjects."""
    from dbtrain.packing.size import measured_size
    from dbtrain.training.identity import subject_config

    configs = [subject_config(base.settings, subject) for subject in subjects]
    with beating(watch.beat, "measure"):
        return measured_size(base, watch, configs, len(subjects))


def to_subject(spec: dict[str, Any]) -> Subject:
    """A subject as training needs it: its photos are in the shards."""
    return Subject(images=(), **{key: value for key, value in spec.items() if key != "identifier"})


def draw_priors(base: Base, watch: Watch, task: Task, order: Order, send: Callable[[Message], None]) -> None:
    """Draw this unit's part of a class's priors; a gang's members share it among themselves."""
    from dbtrain.engines.world import World
    from dbtrain.models.sampling import sampling_mode
    from dbtrain.priors.draw import make_priors
    from dbtrain.priors.store import prior_key

    config, unit, world = base.settings, order.unit, base.world
    store = Path(config.prior.store) if config.prior.store else Path(task.out) / "priors"
    if world.size == 1:
        world = World(unit.part, unit.parts, world.device)
    key = prior_key(config, base.models, unit.class_noun)

    def stop() -> bool:
        watch.beat("prior")  # also while another run draws the same images
        return watch.stop.asked

    with sampling_mode(base.models), beating(watch.beat, "prior"):
        images, batch = config.prior.images, config.prior.batch
        make_priors(store, key, images, base.family, base.models, world, batch, stop=stop)
    if watch.stop.asked:
        raise StopRequested("stopped on request while priors were drawn")


def draw_and_score(base: Base, watch: Watch, task: Task, order: Order, send: Callable[[Message], None]) -> None:
    """Generate and evaluate for finished subjects; what fails by itself is told and holds nobody up. Of a gang, the
    first member works and the others have nothing to do."""
    from dbtrain.fleet.afterwards import AFTER

    work = zip(order.specs, order.unit.positions, order.after) if base.world.first else ()
    for spec, position, names in work:
        for name in names:
            if watch.stop.asked:
                raise StopRequested("stopped on request between subjects")
            outcome = "done"
            try:
                with beating(watch.beat, name):
                    AFTER[name](base, watch, Path(task.out) / "subjects" / spec["id"], task)
            except Exception as error:
                cause, outcome = explain(error)
                if not BLAMED[cause] or cause == "file":
                    raise  # of a file the worker finds out whether the disk is at fault
                traceback.print_exc()
            send(("after", order.number, position, name, outcome))


@contextlib.contextmanager
def beating(beat: Callable[[str], None], stage: str) -> Iterator[None]:
    """Every forward pass of a module tells that this process lives, and at what: a picture may take long, and what
    draws or scores it knows nothing of a fleet."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    hook = register_module_forward_pre_hook(lambda *_: beat(stage))
    try:
        yield
    finally:
        hook.remove()


WORK = {"train": train, "prior": draw_priors, "after": draw_and_score}
"""What a trainer does for each kind of unit."""
