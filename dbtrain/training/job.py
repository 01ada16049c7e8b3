"""One subject's training: build -> resume -> loop -> publish."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dbtrain import __version__
from dbtrain.data.stream import read_samples, refuse_small
from dbtrain.engines.capture import Capture, choose_capture, compile_regions
from dbtrain.engines.engine import BatchPlan, EngineState, lr_scale, plan_batches
from dbtrain.engines.world import from_first, together
from dbtrain.engines.zero import ZeroEngine
from dbtrain.errors import DbtrainError, EngineError, StopRequested
from dbtrain.models.load import base_digest
from dbtrain.models.sampling import draw_samples, make_pipeline, sampling_mode
from dbtrain.randomness import stream_key
from dbtrain.results.card import publish_card
from dbtrain.results.checkpoint import Checkpoint, save_checkpoint
from dbtrain.results.record import write_record
from dbtrain.results.sheets import publish_sheet
from dbtrain.settings.config import RunConfig
from dbtrain.settings.recipes import render
from dbtrain.subjects.prompts import fill
from dbtrain.training.bank import Bank, captions_of, fill_bank
from dbtrain.training.claims import choose_checkpoint, read_chosen, read_finished, take_subject
from dbtrain.training.identity import data_digest, run_digest, subject_config
from dbtrain.training.session import Session, load_base, restore_base
from dbtrain.training.step import TrainingStep
from dbtrain.training.telemetry import Meter, Progress, open_sinks, peak_memory_gib
from dbtrain.training.trainables import final_weights, make_trainable, publish_weights
from dbtrain.values import Batch, Role, Sample, StepLoss, Subject

Finished = Callable[[Subject, dict[str, Any] | DbtrainError], None]
"""What is told of a subject that has ended: its record, or why it failed."""


def open_job(session: Session, subject: Subject) -> Job | dict[str, Any]:
    """What there is to do for a subject, its bank filled; or its record, if it is done already.

    All ranks get the same, or the same DbtrainError.
    """
    config = subject_config(session.config, subject)
    folder = session.out / "subjects" / subject.id
    world, stages = session.world, session.start_stages()
    with ExitStack() as fence:
        from_first(world, lambda: take_subject(session, folder, fence))
        with stages("data"):
            instances, run = together(world, lambda: _instances(session, subject, config))
        done = from_first(world, lambda: read_finished(session, folder, run))
        if done is not None:
            session.say(f"{subject.id}: already finished in {folder}")
            return done
        found = from_first(world, lambda: choose_checkpoint(session, folder, config.checkpoint, run))
        from_first(world, session.opened)
        bank = fill_bank(session, subject, config, instances)
        return Job(session, subject, config, folder, run, bank, found, fence.pop_all())


def _instances(session: Session, subject: Subject, config: RunConfig) -> tuple[list[Sample], str]:
    """A subject's stored photos, and the digest of all that decides its result."""
    entries, data = session.index.entries_of(subject.id), config.data
    instances = list(read_samples(session.shards, entries, data.schemes))
    refuse_small(instances, data.resolution, session.shards)
    return instances, run_digest(config, subject, session, instances)


@dataclass
class Job:
    """One subject's training. found: the checkpoint to go on from. fence: what keeps others from the subject."""

    session: Session
    subject: Subject
    config: RunConfig
    folder: Path
    run: str
    bank: Bank
    found: Path | None
    fence: ExitStack

    def close(self) -> None:
        """Let others train the subject."""
        self.fence.close()

    def run_to_end(self) -> dict[str, Any]:
        """Build, resume, loop, publish."""
        config, session = self.config, self.session
        plan = plan_batches(config.train.batch, config.train.micro_batch, session.world.size)
        with session.stages("build"):
            captions = captions_of(session.family, session.models, config, self.bank.texts, session.world.device)
            groups = make_trainable(session.family, session.models, config, self.subject.id)
            module = TrainingStep(
                session.family, session.models, config, stream_key(config.seed, self.subject.id), captions
            )
            engine = ZeroEngine(module, groups, config, plan, session.world)
        try:
            start = self.resume(engine)
            values = self.loop(engine, plan, start)
            state = engine.state()
        finally:
            engine.close()
        return self.publish(state, values)

    def resume(self, engine: ZeroEngine) -> int:
        """The step to go on from: after the newest good checkpoint of this run, or 0."""
        found = self.checkpoint()
        if found is None:
            return 0
        engine.load(found.state, found.step)
        return found.step

    def checkpoint(self) -> Checkpoint | None:
        """The contents of the checkpoint to go on from; None is a fresh start."""
        return read_chosen(self.session, self.found) if self.found else None

    def loop(self, engine: ZeroEngine, plan: BatchPlan, start: int) -> dict[str, float]:
        """Train to the last step; the last log interval's values."""
        session, config, steps = self.session, self.config, self.config.train.steps
        sinks = open_sinks(config, self.folder, self.subject.id) if session.world.first else []
        progress = Progress(self.subject.id, steps, start, session.quiet or not session.world.first)
        meter, values = Meter(), {"loss": math.nan}
        try:
            for step in range(start, steps):
                with session.stages("train"):
                    measured, wait_s = train_step(
                        engine, self.bank, plan, step, session, lr_scale(step, config.train, steps)
                    )
                if step == start and self.capture.mode == "compile":
                    compile_regions(session.models.denoiser)
                meter.add(self.images_a_step, wait_s, measured)
                progress.advance(step + 1)
                if (step + 1) % config.track.every_steps == 0 or step + 1 == steps:
                    values = {**meter.read(), "memory_gib": peak_memory_gib(session.world.device)}
                    meter.reset()
                    progress.report(step + 1, values)
                    for sink in sinks:
                        sink.log(step + 1, values)
                self.after_step(engine, step + 1, measured["stop"] > 0)
        finally:
            progress.close()
            for sink in sinks:
                sink.close()
        return values

    @property
    def capture(self) -> Capture:
        """How a step is run."""
        return choose_capture(self.config.engine, torch.device(self.session.world.device).type)

    @property
    def images_a_step(self) -> int:
        """Samples of one global step, instance and prior."""
        return self.config.train.batch * len(self.bank.items)

    def after_step(self, engine: ZeroEngine, done: int, stop: bool) -> None:
        """Checkpoint and sample when they are due, or when asked to stop; the last step needs neither."""
        every, sample_every = self.config.checkpoint.every_steps, self.config.sample.every_steps
        if done == self.config.train.steps:
            return
        if stop or (every and done % every == 0):
            with self.session.stages("save"):
                state = engine.state()
                if self.session.world.first:
                    save_checkpoint(
                        self.folder / "checkpoints", Checkpoint(done, self.run, state), self.config.checkpoint.keep
                    )
        if stop:
            raise StopRequested(
                f"{self.subject.id}: stopped on request after step {done}; run the same command to go on"
            )
        if sample_every and done % sample_every == 0:
            with self.session.stages("sample"):
                self.sample(f"step-{done:06d}")

    def sample(self, name: str) -> Path | None:
        """Draw the validation prompts with the weights as they are; the sheet's path on the first rank."""
        session, settings = self.session, self.config.sample
        drawing = session.world.first or self.config.engine.zero.stage == 3
        if not (settings.images and settings.prompts and drawing):
            return None
        identifier = session.identifiers[self.subject.id]
        prompts = [
            fill(prompt, identifier=identifier, class_noun=self.subject.class_noun) for prompt in settings.prompts
        ]
        with sampling_mode(session.models):
            rows = draw_samples(
                make_pipeline(session.family, session.models),
                prompts,
                settings,
                self.config.data.resolution,
                self.config.train.precision,
            )
        return publish_sheet(self.folder, rows, prompts, name) if session.world.first else None

    def publish(self, state: dict, values: dict[str, float]) -> dict[str, Any]:
        """Write the artefacts and the record; give the base back as it was."""
        session, config = self.session, self.config
        record = self.record(values)
        if config.engine.zero.stage == 3:
            session.models = load_base(config, session.world)
            make_trainable(session.family, session.models, config, self.subject.id)
        if session.world.first:
            final_weights(session.family, session.models, state, session.world.device)
            with session.stages("sample"):
                sheet = self.sample("samples")
            record["stages_s"] = {name: round(seconds, 3) for name, seconds in session.stages.seconds.items()}
            self.write(state, record, sheet)
        dist.barrier()
        restore_base(session)
        return record

    def write(self, state: EngineState, record: dict[str, Any], sheet: Path | None) -> None:
        """The subject's artefacts, then its card, then the record that says it is done."""
        family, models = self.session.family, self.session.models
        artefacts = publish_weights(self.folder, family, models, self.config, record, state)
        publish_card(self.folder, record, self.config, render(self.config))
        write_record(self.folder, record, [*artefacts, *([sheet] if sheet else [])])

    def record(self, values: dict[str, float]) -> dict[str, Any]:
        """Who was trained, from what, how, and how it went."""
        session, config = self.session, self.config
        return {
            "subject": self.subject.id,
            "class": self.subject.class_noun,
            "identifier": session.identifiers[self.subject.id],
            "caption": self.bank.items[Role.INSTANCE][0].caption,
            "run": self.run,
            "base": config.model.path,
            "family": config.model.family,
            "base_digest": base_digest(session.models),
            "data_digest": data_digest([item.sample for item in self.bank.items[Role.INSTANCE]]),
            "method": config.train.method,
            "steps": config.train.steps,
            "seed": config.seed,
            "lr": config.train.lr,
            "loss": values["loss"],
            "engine": config.engine.kind,
            "world_size": session.world.size,
            "zero_stage": config.engine.zero.stage,
            "peak_memory_gib": peak_memory_gib(session.world.device),
            "dbtrain": __version__,
            "torch": torch.__version__,
            "capture": self.capture._asdict(),
            "attention": session.models.attention.row() if session.models.attention else None,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def train_step(
    engine: ZeroEngine, bank: Bank, plan: BatchPlan, step: int, session: Session, scale: float
) -> tuple[dict[str, float], float]:
    """One optimizer step; its measured values (losses over the global batch) and the seconds spent waiting for data."""
    totals, wait_s = torch.zeros(4, dtype=torch.float64), 0.0
    for turn in range(plan.accumulation):
        begin = time.perf_counter()
        batch = bank.batch(step, plan.slots(session.world, turn), session.world.device)
        wait_s += time.perf_counter() - begin
        loss = engine(batch, step)
        totals[:3] += role_sums(loss, batch, plan.batch)
        totals[3] = float(session.stop)
        if turn == plan.accumulation - 1:
            dist.all_reduce(totals)
            if not math.isfinite(totals[0]):
                raise EngineError(
                    f"step {step + 1}: the loss is {totals[0].item()}; the last checkpoint is kept. "
                    "Lower train.lr, set train.clip_norm, or train in fp32"
                )
        engine.backward(loss.loss)
    norm = engine.step(scale)
    if not 0 <= norm < math.inf:  # DeepSpeed gives -1 for infinite and NaN
        raise EngineError(
            f"step {step + 1}: the gradient is not finite; the last checkpoint is kept. "
            "Lower train.lr, set train.clip_norm, or train in fp32"
        )
    names = ("loss", "loss_instance", "loss_prior", "stop")
    return {**dict(zip(names, totals.tolist())), "grad_norm": norm, "lr": engine.groups[0].lr * scale}, wait_s


def role_sums(loss: StepLoss, batch: Batch, count: int) -> torch.Tensor:
    """[weighted loss, mean instance error, mean prior error], this rank's part of each sum, float64 on the CPU."""
    errors = loss.per_sample_B.detach().double() / count
    prior_B = batch.role_B == int(Role.PRIOR)
    return torch.stack([loss.loss.detach().double(), errors[~prior_B].sum(), errors[prior_B].sum()]).cpu()
