"""What a trainer does for each kind of unit: draw priors, train subjects, draw and score finished ones."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook

from dbtrain.data.index import Index
from dbtrain.engines.world import World
from dbtrain.errors import DbtrainError, StopRequested
from dbtrain.evaluate.judge import load_judge
from dbtrain.evaluate.protocol import Protocol, evaluate_finished
from dbtrain.evaluate.together import draw_together
from dbtrain.fleet.causes import BLAMED, explain
from dbtrain.fleet.messages import Failed, FollowedUp, Measure, Order, Published, Task
from dbtrain.models.sampling import draw_samples, sampling_mode
from dbtrain.packing.size import measured_size
from dbtrain.priors.draw import make_priors
from dbtrain.priors.store import prior_key
from dbtrain.results.finished import finished_config, finished_pipeline, refuse_nothing
from dbtrain.results.record import finished_record
from dbtrain.results.sheets import publish_sheet
from dbtrain.subjects.prompts import fill
from dbtrain.train import train_subjects
from dbtrain.training.identity import subject_config
from dbtrain.training.session import Base, Watch, Work, drawn_texts, prior_folder
from dbtrain.values import Subject

Send = Callable[[Any], None]


class Charges:
    """Seconds charged to each subject of a unit: the time passed is shared by those that train at the moment.

    Of the subjects that have not ended, the first `rows` in order are taken to train; the charges sum to the whole.
    """

    def __init__(self, ids: Sequence[str], rows: int):
        self.open, self.rows, self.last = dict.fromkeys(ids, 0.0), rows, time.monotonic()

    def end(self, subject: str) -> float:
        """The seconds of a subject that ends now."""
        now = time.monotonic()
        training = list(self.open)[: self.rows]
        for name in training:
            self.open[name] += (now - self.last) / len(training)
        self.last = now
        return self.open.pop(subject, 0.0)


@contextlib.contextmanager
def beating(beat: Callable[[str], None], stage: str) -> Iterator[None]:
    """Send a heartbeat on every forward pass of a module, since the code that draws or scores sends none."""
    hook = register_module_forward_pre_hook(lambda *_: beat(stage))
    try:
        yield
    finally:
        hook.remove()


def measure_pack(base: Base, watch: Watch, measure: Measure) -> int:
    """How many subjects a pack holds on this machine, under `engine.packed.size: auto`."""
    config = subject_config(base.settings, Subject("measured", "", (), rank=measure.rank))
    for stage in (base, *base.upscalers):
        stage.ready([("",)])
    with beating(watch.beat, "measure"):
        sizes = [measured_size(stage, watch, [stage.settings], measure.most) for stage in base.upscalers]
        return min([measured_size(base, watch, [config], measure.most), *sizes])


def train(base: Base, watch: Watch, task: Task, order: Order, send: Send) -> None:
    """Train a unit's subjects in packs of the unit's rows; send each one's outcome as it ends."""
    identifiers = {subject.id: subject.identifier for subject in order.subjects if subject.identifier}
    positions = {subject.id: position for subject, position in zip(order.subjects, order.unit.positions)}
    charges = Charges(list(positions), order.unit.pack)

    def finished(subject: Subject, outcome: dict[str, Any] | DbtrainError) -> None:
        seconds = charges.end(subject.id) * base.world.size
        if not base.world.first:
            return
        if isinstance(outcome, Exception):
            send(Failed(order.number, positions[subject.id], explain(outcome), seconds))
        else:
            send(Published(order.number, positions[subject.id], subject.id, seconds))

    if base.settings.engine.kind == "packed":
        base = base.with_pack(order.unit.pack)
    work = Work.under(Path(task.out), base.settings, order.subjects, identifiers, Index(order.rows, ()))
    train_subjects(base, work, watch, finished)


def draw_priors(base: Base, watch: Watch, task: Task, order: Order, send: Send) -> None:
    """Draw this unit's part of a class's priors; a gang's members share it among themselves."""
    config, unit, world = base.settings, order.unit, base.world
    store = prior_folder(config, Path(task.out))
    if world.size == 1:
        world = World(unit.part, unit.parts, world.device)
    key = prior_key(config, base.models, unit.class_noun)
    base.ready(drawn_texts(base, [key.prompt], config.prior.guidance))

    def stop() -> bool:
        watch.beat("prior")  # also while another run draws the same images
        return watch.stop.asked

    with sampling_mode(base.models), beating(watch.beat, "prior"):
        images, batch = config.prior.images, config.prior.batch
        make_priors(store, key, images, base.family, base.models, world, batch, stop=stop)
    if watch.stop.asked:
        raise StopRequested("stopped on request while priors were drawn")


def draw_and_score(base: Base, watch: Watch, task: Task, order: Order, send: Send) -> None:
    """Generate and evaluate for finished subjects. An error of one subject is sent, and the others go on. Of a gang
    the first member works alone."""
    work = [*zip(order.subjects, order.unit.positions, order.after)] if base.world.first else []
    scored = [Path(task.out) / "subjects" / subject.id for subject, _, names in work if "evaluate" in names]
    if len(scored) > 1:
        with beating(watch.beat, "evaluate"):
            draw_together(scored, base.models, base.family, Protocol(**task.evaluation))
    for subject, position, names in work:
        for name in names:
            if watch.stop.asked:
                raise StopRequested("stopped on request between subjects")
            outcome = "done"
            try:
                with beating(watch.beat, name):
                    AFTER[name](base, watch, Path(task.out) / "subjects" / subject.id, task)
            except Exception as error:
                end = explain(error)
                if not BLAMED[end.cause] or end.cause == "file":
                    raise  # of a file the worker finds out whether the disk is at fault
                outcome = end.reason
                traceback.print_exc()
            send(FollowedUp(order.number, position, name, outcome))


def generate(base: Base, watch: Watch, folder: Path, task: Task) -> None:
    """Draw the recipe's prompts into the subject's `generated.png`."""
    record, config = finished_record(folder), finished_config(folder, ())
    refuse_nothing(folder, {"generated": config.sample.prompts}, config)
    names = {"identifier": record["identifier"], "class_noun": record["class"]}
    texts = [fill(prompt, **names) for prompt in config.sample.prompts]
    with finished_pipeline(folder, base.family, base.models, config) as pipeline:
        rows = draw_samples(pipeline, texts, config.sample, config.data.resolution, config.train.precision)
    publish_sheet(folder, rows, texts, "generated")


def evaluate(base: Base, watch: Watch, folder: Path, task: Task) -> None:
    """Score the subject by the run's evaluation protocol into its `evaluation.json`."""
    protocol = Protocol(**task.evaluation)
    judge = warm_judge(protocol.identity, protocol.clip, base.world.device, protocol.distance)
    evaluate_finished(folder, base.models, base.family, protocol, judge)


warm_judge = cache(load_judge)
"""The encoders, loaded once a worker."""


AFTER: dict[str, Callable[[Base, Watch, Path, Task], None]] = {"generate": generate, "evaluate": evaluate}
"""What can be asked for finished subjects, by its name."""
WORK: dict[str, Callable[[Base, Watch, Task, Order, Send], None]] = {
    "train": train,
    "prior": draw_priors,
    "after": draw_and_score,
}
"""What a trainer does, by the kind of unit."""
