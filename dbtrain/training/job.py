"""One subject's training: build, resume, loop, publish."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from dbtrain import __version__
from dbtrain.data.masks import used_samples
from dbtrain.data.stream import read_samples, refuse_small
from dbtrain.engines.capture import Capture, Eager, choose_capture, make_runner
from dbtrain.engines.engine import BatchPlan, Engine, EngineState, keeps_whole, lr_scale, plan_batches
from dbtrain.engines.world import together
from dbtrain.engines.zero import ZeroEngine
from dbtrain.errors import DbtrainError, EngineError, StopRequested
from dbtrain.models.load import base_digest
from dbtrain.models.sampling import Chain, draw_samples, make_enlarger, make_pipeline, sampling_mode, told_of_small
from dbtrain.randomness import stream_key
from dbtrain.results.card import publish_card
from dbtrain.results.checkpoint import Checkpoint, save_checkpoint, step_of
from dbtrain.results.finished import chained
from dbtrain.results.identity import Identity
from dbtrain.results.record import LAST_SHEET, finished_record, write_record
from dbtrain.results.replacing import NEXT, take_place
from dbtrain.results.sheets import publish_sheet
from dbtrain.settings.config import RunConfig
from dbtrain.settings.recipes import render
from dbtrain.settings.stages import stage_names
from dbtrain.subjects.prompts import fill
from dbtrain.training.bank import Bank, ClassImages, captions_of, complete_priors, fill_bank
from dbtrain.training.cadence import due
from dbtrain.training.claims import Claim, claim_subject, read_chosen
from dbtrain.training.held_out import FIXED, Watched, fixed_samples, held_out, turns
from dbtrain.training.identity import data_digest, subject_config, training_identity
from dbtrain.training.session import Base, Watch, Work
from dbtrain.training.step import TrainingStep
from dbtrain.training.stopping import Stop
from dbtrain.training.telemetry import Meter, Progress, open_sinks, peak_memory_gib
from dbtrain.training.trainables import BEST, final_state, final_weights, make_trainable, publish_weights
from dbtrain.values import Batch, Role, Sample, StepLoss, Subject

Finished = Callable[[Subject, dict[str, Any] | DbtrainError], None]
"""Called with a subject that has ended, and its record or the error that ended it."""
OF_STAGE = ("family", "base", "base_digest", "method", "steps", "loss", "run", "level", "enlarged_to", "stages_s")
"""What the record of the first stage says of each that enlarges."""
REMEDY = "Lower train.lr, set train.clip_norm, or train in fp32"


def open_job(
    base: Base, work: Work, watch: Watch, subject: Subject, class_images: ClassImages = complete_priors
) -> Job | dict[str, Any]:
    """What there is to do for a subject, its bank filled; or its record, if it is finished already.

    All ranks get the same, or the same DbtrainError. class_images: how the priors of its class are got.
    """
    config, watch = subject_config(base.settings, subject), watch.timed_apart()
    with watch.clock.stage("data"):
        instances, wanted = together(base.world, lambda: _instances(base, work, subject, config))
    with ExitStack() as fence:
        folder = work.folder(subject)
        claim = claim_subject(base.world, watch, folder, config.checkpoint, wanted, fence)
        if claim.record is not None:
            watch.say(f"{subject.id}: already finished in {folder}")
            return claim.record
        bank = fill_bank(base, work, watch, subject, config, instances, class_images)
        bank.held, watched = held_out(len(instances), config.train.stop), Watched(config.train.stop)
        return Job(base, work, watch, subject, config, wanted, bank, claim, fence.pop_all(), watched)


def _instances(base: Base, work: Work, subject: Subject, config: RunConfig) -> tuple[list[Sample], Identity]:
    """A subject's stored photos, and all that decides its result."""
    entries, data = work.index.entries_of(subject.id), config.data
    instances = used_samples(read_samples(work.shards, entries, data.schemes), data, work.shards)
    refuse_small(instances, data.resolution, work.shards)
    return instances, training_identity(config, subject, base, work, instances)


@dataclass(frozen=True)
class Job:
    """One subject's training. config: the run's settings with the subject's own. identity: what decides its result.

    claim: where to go on. fence: holds the lock on the subject's folder. watched: what `train.stop` has seen.
    """

    base: Base
    work: Work
    watch: Watch
    subject: Subject
    config: RunConfig
    identity: Identity
    bank: Bank
    claim: Claim
    fence: ExitStack
    watched: Watched = field(default_factory=Watched)

    def close(self) -> None:
        """Release the lock on the subject's folder."""
        self.fence.close()

    @property
    def folder(self) -> Path:
        """The folder of the subject's results."""
        return self.work.folder(self.subject)

    @property
    def results(self) -> Path:
        """Where the result is written: the subject's folder, or a place in it until it may replace an older one."""
        return self.folder / NEXT if self.claim.replaces else self.folder

    @property
    def images_a_step(self) -> int:
        """Samples of one global step, instance and prior."""
        return self.config.train.batch * len(self.bank.items)

    def run_to_end(self) -> dict[str, Any]:
        """The subject's record, after it was built, resumed, trained and published."""
        config, base = self.config, self.base
        # A forward pass has one shape, so photos of several go through it one at a time.
        micro = config.train.micro_batch if len(self.bank.kinds) == 1 else 1
        plan = plan_batches(config.train.batch, micro, base.world.size)
        choice = choose_capture(config.engine, torch.device(base.world.device).type)
        runner = make_runner(choice, base.models.denoiser, base.family.regions)
        with self.watch.clock.stage("build"):
            engine = self.build(plan)
        try:
            start = self.resume(engine)
            values = self.loop(engine, runner, plan, start)
            state = engine.state() | self.watched.best
        finally:
            engine.close()
        return self.publish(state, values, runner.choice)

    def build(self, plan: BatchPlan) -> ZeroEngine:
        """An engine around the subject's training step, at step 0."""
        family, models, config, world = self.base.family, self.base.models, self.config, self.base.world
        captions = captions_of(family, models, config, self.bank.texts, world.device)
        self.base.share(plan)
        groups = make_trainable(family, models, config, self.subject.id)
        module = TrainingStep(family, models, config, stream_key(config.seed, self.subject.id), captions)
        return ZeroEngine(module, groups, config, plan, world)

    def resume(self, engine: ZeroEngine) -> int:
        """The step to go on from: that of the chosen checkpoint, which the engine then continues, or 0."""
        checkpoint = self.checkpoint()
        if checkpoint is None:
            return 0
        engine.load(checkpoint.state, checkpoint.step)
        return checkpoint.step

    def checkpoint(self) -> Checkpoint | None:
        """The contents of the checkpoint to go on from; None is a fresh start."""
        if self.claim.checkpoint is None:
            return None
        found = read_chosen(self.base.world, self.watch, self.claim.checkpoint)
        self.watched.restore(found.stop, found.state.get(BEST, {}))
        return found

    def loop(self, engine: ZeroEngine, runner: Eager, plan: BatchPlan, start: int) -> dict[str, float]:
        """The last log interval's values, after the subject has trained to its last step."""
        config, steps, world, watch = self.config, self.config.train.steps, self.base.world, self.watch
        sinks = open_sinks(config, self.folder, self.subject.id) if world.first else []
        progress = Progress(self.subject.id, steps, start, watch.quiet)
        meter, values = Meter(), {"loss": math.nan}
        try:
            for done in range(start + 1, steps + 1):
                scale = lr_scale(done - 1, config.train, steps)
                with watch.clock.stage("train"):
                    measured, wait_s = train_step(engine, runner, self.bank, plan, done - 1, scale, watch.stop)
                meter.add(self.images_a_step, wait_s, measured)
                progress.advance(done)
                ended = due(done, config).observe and self.observe(engine, plan, done)
                if due(done, config).log:
                    values = {**meter.read(), **self.watched.values, "memory_gib": peak_memory_gib(world.device)}
                    meter.reset()
                    progress.report(done, values)
                    watch.logged(self.subject.id, done, steps, values)
                    for sink in sinks:
                        sink.log(done, values)
                if ended:
                    break
                self.after_step(engine, done, measured["stop"] > 0)
        finally:
            progress.close()
            for sink in sinks:
                sink.close()
        return values

    @torch.no_grad()
    def observe(self, engine: ZeroEngine, plan: BatchPlan, done: int) -> bool:
        """Whether `train.stop` ends training after this step. All ranks observe the same and share the mean."""
        stop, device = self.config.train.stop, self.base.world.device
        with self.watch.clock.stage("stop"):
            passes = turns(stop.samples, plan.micro * len(self.bank.items) if len(self.bank.kinds) == 1 else 1)
            drawn = (fixed_samples(self.bank, slots).sent(device) for slots in passes)
            errors = [engine.deepspeed.module(batch, FIXED).per_sample_B.double() for batch in drawn]
            loss = torch.cat(errors).mean().cpu()
            dist.all_reduce(loss)
            ended = self.watched.observe(done, float(loss) / self.base.world.size, lambda: final_state(engine.state()))
        self.tell_end()
        return ended

    def tell_end(self) -> None:
        """Say that `train.stop` has ended the training, if it has."""
        if self.watched.ended and self.base.world.first:
            self.watch.say(f"{self.subject.id}: {self.watched.text}")

    def after_step(self, engine: Engine, done: int, stop: bool) -> None:
        """Save a checkpoint and draw samples when they are due, or when asked to stop; after the last step it is too
        late to stop."""
        now, clock = due(done, self.config), self.watch.clock
        stop = stop and not now.end
        if stop or now.checkpoint:
            with clock.stage("save"):
                snapshot = self.snapshot(engine, done)
                if self.base.world.first:
                    self.save(snapshot)
        if stop:
            raise StopRequested(
                f"{self.subject.id}: stopped on request after step {done}; run the same command to go on"
            )
        if now.sample:
            with clock.stage("sample"):
                self.sample(f"step-{done:06d}")

    def snapshot(self, engine: Engine, done: int, row: int = 0, average: float = 0.0) -> Checkpoint:
        """The subject's state after `done` steps, copied out of its row of an engine. average: see `Checkpoint`."""
        state = engine.state(row) | self.watched.best
        return Checkpoint(done, self.identity.run, state, average, self.identity.about, self.watched.numbers())

    def save(self, snapshot: Checkpoint) -> None:
        """Write a snapshot as a checkpoint of the subject."""
        save_checkpoint(self.folder / "checkpoints", snapshot, self.config.checkpoint.keep)

    def sample(self, name: str) -> Path | None:
        """The sheet of the validation prompts, drawn with the weights as they are; None on other ranks than the first,
        and where there is nothing to draw."""
        base, prompts = self.base, self.prompts
        drawing = base.world.first or not keeps_whole(self.config.engine)
        if not (prompts and drawing):
            return None
        resolution, precision = self.config.data.resolution, self.config.train.precision
        chosen = (prompts, self.config.sample, resolution, precision)
        with sampling_mode(base.models), sampling_pipeline([self]) as pipeline:
            rows = draw_samples(pipeline, *chosen)
        return self.publish_samples(rows, name) if base.world.first else None

    @property
    def prompts(self) -> list[str]:
        """The validation prompts in the subject's words; none where there is nothing to draw."""
        names = {"identifier": self.work.identifiers[self.subject.id], "class_noun": self.subject.class_noun}
        settings = self.config.sample
        return [fill(prompt, **names) for prompt in settings.prompts] if settings.images else []

    def publish_samples(self, rows: Sequence[Sequence[Image.Image]], name: str) -> Path:
        """The path of the sheet of pictures drawn for `prompts`, a row each."""
        return publish_sheet(self.results if name == LAST_SHEET else self.folder, rows, self.prompts, name)

    def publish(self, state: EngineState, values: dict[str, float], capture: Capture) -> dict[str, Any]:
        """The record, after the artefacts were written and the base was made what it was before the subject."""
        base, config, clock = self.base, self.config, self.watch.clock
        record = self.record(values, capture)
        if not keeps_whole(config.engine):
            base.reload()
        if base.world.first:
            with base.whole():
                if not keeps_whole(config.engine):
                    make_trainable(base.family, base.models, config, self.subject.id)
                final_weights(base.family, base.models, state, base.world.device)
                with clock.stage("sample"):
                    sheet = self.sample(LAST_SHEET)
                record["stages_s"] = {name: round(seconds, 3) for name, seconds in clock.seconds.items()}
                self.write(state, record, sheet)
        dist.barrier()
        base.restore()
        return record

    def write(self, state: EngineState, record: dict[str, Any], sheet: Path | None) -> None:
        """Write the subject's artefacts, then its card, then the record that says it is finished."""
        self.results.mkdir(exist_ok=True)
        artefacts = publish_weights(self.results, self.base.family, self.base.models, self.config, record, state)
        stages = {name: finished_record(self.folder / name) for name in stage_names(self.config)}
        if stages:
            told = {name: {key: of.get(key) for key in OF_STAGE} for name, of in stages.items()}
            record["stages"] = [{"folder": name, **of} for name, of in told.items()]
        # Where results are sent is nobody's business who gets one.
        publish = self.config.publish.model_copy(update={"to": None})
        publish_card(self.results, record, self.config, render(self.config.model_copy(update={"publish": publish})))
        beside = {f"{name}/{file}": digest for name, of in stages.items() for file, digest in of["files"].items()}
        write_record(self.results, record, [*artefacts, *([sheet] if sheet else [])], self.folder, beside)
        take_place(self.folder)

    def record(self, values: dict[str, float], capture: Capture) -> dict[str, Any]:
        """Who was trained, from what, how, and how it went."""
        base, config = self.base, self.config
        instances = self.bank.items[Role.INSTANCE]
        return {
            "subject": self.subject.id,
            "class": self.subject.class_noun,
            "identifier": self.work.identifiers[self.subject.id],
            "caption": instances[0].caption,
            "run": self.identity.run,
            "about": self.identity.about,
            "base": config.model.path,
            "family": config.model.family,
            "base_digest": base_digest(base.models),
            "data_digest": data_digest([item.sample for item in instances]),
            "method": config.train.method,
            "steps": self.watched.ended or config.train.steps,
            "begun_at": step_of(self.claim.checkpoint) if self.claim.checkpoint else 0,
            "seed": config.seed,
            "lr": config.train.lr,
            "loss": values["loss"],
            "engine": config.engine.kind,
            "world_size": base.world.size,
            "zero_stage": config.engine.zero.stage,
            "peak_memory_gib": peak_memory_gib(base.world.device),
            "dbtrain": __version__,
            "torch": torch.__version__,
            "capture": capture._asdict(),
            "attention": base.models.attention.row() if base.models.attention else None,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **self.watched.told(self.bank.held),
            **(told_of_small(config) if base.family.guide else {}),
        }


def train_step(
    engine: ZeroEngine, runner: Eager, bank: Bank, plan: BatchPlan, step: int, scale: float, stop: Stop
) -> tuple[dict[str, float], float]:
    """One optimizer step; its measured values (losses over the global batch) and the seconds spent waiting for data.

    scale: share of the peak learning rates. `stop` of the values is above 0 if any rank was asked to stop.
    """
    world, wait_s, turns_left = engine.world, 0.0, plan.accumulation
    totals = torch.zeros(4, dtype=torch.float64)

    def add_gradient(batch: Batch) -> None:
        nonlocal turns_left
        loss = engine(batch, step)
        totals[:3] += role_sums(loss, batch, plan.batch)
        turns_left -= 1
        if not turns_left:
            totals[3] = float(stop.asked)
            dist.all_reduce(totals)
            if not math.isfinite(totals[0]):
                what = f"step {step + 1}: the loss is {totals[0].item()}; the last checkpoint is kept"
                raise EngineError(f"{what}. {REMEDY}")
        engine.backward(loss.loss)

    for turn in range(plan.accumulation):
        begun = time.perf_counter()
        batch = bank.batch(step, plan.slots(world, turn), world.device)
        wait_s += time.perf_counter() - begun
        runner(add_gradient, batch)
    norm = engine.step(scale)
    if not 0 <= norm < math.inf:  # DeepSpeed gives -1 for infinite and NaN
        raise EngineError(f"step {step + 1}: the gradient is not finite; the last checkpoint is kept. {REMEDY}")
    names = ("loss", "loss_instance", "loss_prior", "stop")
    return {**dict(zip(names, totals.tolist())), "grad_norm": norm, "lr": engine.groups[0].lr * scale}, wait_s


def role_sums(loss: StepLoss, batch: Batch, count: int) -> torch.Tensor:
    """[weighted loss, mean instance error, mean prior error], this rank's part of each sum, float64 on the CPU."""
    errors = loss.per_sample_B.detach().double() / count
    prior_B = batch.role_B == int(Role.PRIOR)
    return torch.stack([loss.loss.detach().double(), errors[~prior_B].sum(), errors[prior_B].sum()]).cpu()


@contextmanager
def sampling_pipeline(jobs: Sequence[Job], rows: Sequence[int] | None = None) -> Iterator[Any]:
    """What draws the validation prompts of some jobs on one base, a job after another, with each subject's stages that
    enlarge after it. A base that enlarges is given each subject's own photos, reduced and taken in turn.

    rows: of the jobs in the stack of adapters, where there are several."""
    base, config = jobs[0].base, jobs[0].config
    if base.family.guide is None:
        first: Any = make_pipeline(base.family, base.models)
    else:
        photos: list[Image.Image] = []
        for job in jobs:
            photos += islice(cycle(job.bank.small_photos()), len(job.prompts) * config.sample.images)
        first = Chain(photos, (make_enlarger(base.family, base.models, config),))
    with chained(first, [job.folder for job in jobs], base.models, base.settings, rows) as pipeline:
        yield pipeline
