"""Who sits where: subjects take rows of a pack, train side by side, end each at its own step, and make room at once.

While a pack trains, one thread fills the next subjects' banks, and another writes what finished subjects leave behind.
The pack always runs all its rows, so that a subject's result depends on the size of the pack and on nothing else in it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dbtrain.data.prefetch import ahead
from dbtrain.errors import ConfigError, DbtrainError, EngineError, StopRequested, first_line
from dbtrain.models.adapters import only_row
from dbtrain.models.family import encode_images
from dbtrain.packing.clock import Clock
from dbtrain.packing.pack import Observed, Pack, Start
from dbtrain.packing.size import Probe, choose_size, free_bytes, timed, used_bytes
from dbtrain.priors.store import prior_key
from dbtrain.results.checkpoint import Checkpoint, save_checkpoint
from dbtrain.results.record import looks_finished
from dbtrain.storage.trouble import bare
from dbtrain.training.bank import captions_of, ensure_priors
from dbtrain.training.identity import subject_config
from dbtrain.training.job import Finished, Job, open_job
from dbtrain.training.session import ClassPriors, Session, restore_base
from dbtrain.training.telemetry import Progress, Sink, Stages, open_sinks, peak_memory_gib
from dbtrain.training.trainables import fresh_adapter
from dbtrain.values import Subject

CLASSES = 8
"""Classes whose priors stay encoded on the device; the subjects under way hold on to theirs in any case."""
Prepared = tuple[Job, Start]


def train_packed(session: Session, subjects: Sequence[Subject], finished: Finished) -> None:
    """What `train.train_subjects` is, many subjects at a time; `finished` is called from this thread alone."""
    if session.world.size > 1:
        raise ConfigError(
            f"engine.kind: a pack trains in one process, got {session.world.size}; start one `dbtrain train` (or one "
            "fleet worker) a GPU"
        )
    if subjects:
        PackedRun(session, subjects, finished).run()


@dataclass
class Seat:
    """A subject in its row. shares: seconds by stage that were spent on it. step: steps asked of the device."""

    row: int
    job: Job
    shares: dict[str, float]
    sinks: list[Sink]
    step: int
    begun: float = field(default_factory=time.perf_counter)
    wait_s: float = 0.0
    logged_step: int = 0
    values: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.logged_step = self.step

    def at(self, every: int) -> bool:
        """Whether what comes every so many steps (0 is never) comes now."""
        return every > 0 and self.step % every == 0

    @property
    def due(self) -> bool:
        """Whether there is anything to do for it but to go on."""
        config = self.job.config
        every = (config.track.every_steps, config.checkpoint.every_steps, config.sample.every_steps)
        return self.step >= config.train.steps or any(self.at(steps) for steps in every)


class PackedRun:
    """The training of some subjects in a pack, from the first bank to the last record."""

    def __init__(self, session: Session, subjects: Sequence[Subject], finished: Finished):
        before = session.stages.seconds
        self.session, self.subjects, self.tell = session, subjects, finished
        session.start_stages()
        # Of its own: what the functions below time for themselves must not count twice.
        self.clock = Clock(Stages(session.beat), before)
        self.configs = [subject_config(session.config, subject) for subject in subjects]
        self.seats: dict[int, Seat] = {}
        self.priorless: dict[str, DbtrainError] = {}
        self.writer = ThreadPoolExecutor(1)
        self.pending: deque[tuple[Subject | None, Future]] = deque()
        self.ended = 0

    def run(self) -> None:
        """Train every subject; see `train_packed`."""
        session, begun = self.session, time.perf_counter()
        self._check()
        self._draw_priors()
        self.clock.lap("prior")
        try:
            self.size = self._size()
            self.pack = self._pack(self.size)
            self.clock.lap("capture")
            self.common = self.clock.common(len(self.subjects))
            with closing(ahead(self._prepare, self.subjects, threads=1, depth=self.size)) as prepared:
                self._train(prepared)
        finally:
            self.writer.shutdown(wait=True)  # what was handed to it is a finished subject's, whatever ended the run
            for seat in self.seats.values():
                close(seat.sinks)
                seat.job.close()
            restore_base(session)
        self.clock.lap("idle")
        spent = "  ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.clock.stages.seconds.items())
        session.say(f"pack: {self.ended} subjects in {time.perf_counter() - begun:.1f} s; by stage: {spent}")
        session.start_stages()

    def _check(self) -> None:
        """Nothing; ConfigError for what the subjects cannot have of their own in a pack."""
        for subject, config in zip(self.subjects, self.configs):
            if (config.prior.weight > 0) != (self.session.config.prior.weight > 0):
                raise ConfigError(
                    f"{subject.id}: prior_weight is {config.prior.weight} while prior.weight is 0, and the subjects of "
                    "a pack have priors all or none; set prior.weight, or take the column out"
                )

    def _draw_priors(self) -> None:
        """Complete the priors of every class that is needed, with the base as it is. What fails for a class is kept for
        its subjects, and holds no others up."""
        session = self.session
        session.classes_kept = max(session.classes_kept, CLASSES)
        if session.config.prior.weight > 0:
            todo = [one for one in self.subjects if not looks_finished(session.out / "subjects" / one.id)]
            for noun in dict.fromkeys(subject.class_noun for subject in todo):
                key = prior_key(session.config, session.models, noun)
                try:
                    samples = ensure_priors(session, session.config, key)
                except StopRequested:
                    raise
                except DbtrainError as error:
                    self.priorless |= {one.id: bare(error) for one in todo if one.class_noun == noun}
                    continue
                session.keep_priors((key, session.config.prior.images), ClassPriors(samples))

    def _pack(self, size: int) -> Pack:
        """An empty pack that every subject fits in; always as wide, so that the same subjects give the same bits."""
        session = self.session
        rank, steps = (max(values) for values in zip(*((c.lora.rank, c.train.steps) for c in self.configs)))
        captions = captions_of(session.family, session.models, session.config, [""], session.world.device)
        return Pack(session.family, session.models, session.config, size, rank, steps, captions)

    def _sample_shape(self) -> torch.Size:
        """Shape of a sample as the banks give it: VAE moments, or pixels where they are encoded anew each step."""
        data, session = self.session.config.data, self.session
        pixels = torch.zeros(1, 3, data.resolution, data.resolution, device=session.world.device)
        with torch.no_grad():
            cached = data.cache_latents and data.crop == "center"
            return (encode_images(session.models.vae, pixels) if cached else pixels).shape[1:]

    def _size(self) -> int:
        """Rows of the pack: as told, or as measured with the first subject in every row."""
        session, settings = self.session, self.session.config.engine.packed
        if settings.size != "auto":
            return settings.size
        if session.pack_size is None:
            device = session.world.device
            size, why = choose_size(self._probe, settings, free_bytes(device), len(self.subjects))
            session.pack_size = size
            session.say(f"engine.packed.size: auto: {why}")
        return session.pack_size

    def _probe(self, size: int) -> Probe | None:
        """Memory and time of a pack's step, on random samples of the shapes of training; None where memory ran out."""
        device = self.session.world.device
        try:
            with used_bytes(device) as used:
                pack = self._pack(size)
                batch = pack.rehearsal(self._sample_shape())
                for _ in range(pack.warm_steps):
                    pack.step(batch)
            return Probe(size, used[0], timed(lambda: pack.step(batch), device))
        except torch.OutOfMemoryError:
            return None
        finally:
            # A pack is in no circle of references, so nothing of it is left when the next one is measured.
            restore_base(self.session)

    def _prepare(self, subject: Subject) -> tuple[Subject, Prepared | dict[str, Any] | DbtrainError]:
        """What a subject trains from, or its record if it is done, or what keeps it from training. Runs ahead, in a
        thread of its own, and touches nothing that trains."""
        if subject.id in self.priorless:
            return subject, self.priorless[subject.id]
        session = replace(self.session, stages=Stages(), priors_drawn=True)
        try:
            job = open_job(session, subject)
            if isinstance(job, dict):
                return subject, job
            family, models, config = session.family, session.models, job.config
            captions = captions_of(family, models, config, job.bank.texts, session.world.device)
            found = job.checkpoint()
            if found is None:
                found = Checkpoint(0, job.run, {"master": fresh_adapter(family, models, config, subject.id)})
        except DbtrainError as error:
            return subject, bare(error)
        except torch.OutOfMemoryError as error:
            return subject, EngineError(f"memory ran out while its photos were encoded: {first_line(error)}")
        return subject, (job, Start(subject.id, config, captions, found))

    def _train(self, prepared: Iterator) -> None:
        steps = sum(config.train.steps for config in self.configs)
        self.progress = Progress(f"pack of {self.size}", steps, 0, self.session.quiet)
        self.done_steps = 0
        try:
            while self._fill(prepared):
                self._step()
                if self.session.stop or any(seat.due for seat in self.seats.values()):
                    self._settle()
                self._tell_ended()
                if self.session.stop and self._left():
                    self._tell_ended(wait=True)
                    raise StopRequested(
                        f"pack: stopped on request, {len(self.seats)} subjects under way; run the same command to go on"
                    )
            self._tell_ended(wait=True)
        finally:
            self.progress.close()

    def _left(self) -> int:
        """Subjects that have not ended; checkpoints are on their way to the disk too, and are nobody's end."""
        return len(self.subjects) - self.ended - sum(subject is not None for subject, _ in self.pending)

    def _fill(self, prepared: Iterator) -> bool:
        """Whether any subject is seated, after subjects took all free rows."""
        for row in range(self.size):
            while row not in self.seats:
                found = next(prepared, None)
                if found is None:
                    break
                subject, what = found
                shares = dict(self.common)
                self.clock.lap("encode", [shares])
                if isinstance(what, tuple):
                    self._seat(row, what[0], what[1], shares)
                else:
                    self._tell(subject, what)
        return bool(self.seats)

    def _seat(self, row: int, job: Job, start: Start, shares: dict[str, float]) -> None:
        self.pack.seat(row, start)
        sinks = open_sinks(job.config, job.folder, job.subject.id)
        self.seats[row] = Seat(row, job, shares, sinks, start.found.step)

    def _step(self) -> None:
        """One step of every seated subject."""
        begun, seats = time.perf_counter(), list(self.seats.values())
        batch = self.pack.batch([(seat.row, seat.job.bank, seat.step) for seat in seats])
        wait_s = time.perf_counter() - begun
        self.pack.step(batch)
        for seat in seats:
            seat.step, seat.wait_s = seat.step + 1, seat.wait_s + wait_s
        self.done_steps += len(seats)
        self.progress.advance(self.done_steps)
        self.clock.lap("train", [seat.shares for seat in seats], self.size)

    def _settle(self) -> None:
        """Do what is due: end subjects, write log lines and checkpoints, draw samples."""
        rows = self.pack.observe()
        self.clock.lap("train", [seat.shares for seat in self.seats.values()], self.size)
        shown = []
        for seat in list(self.seats.values()):
            seen, config = rows[seat.row], seat.job.config
            if seen.failed:
                self._fail(seat, seen)
            elif not seen.live:
                shown.append(self._log(seat, seen))
                self._finish(seat, seen)
            else:
                if seat.at(config.track.every_steps):
                    shown.append(self._log(seat, seen))
                if self.session.stop or seat.at(config.checkpoint.every_steps):
                    self._checkpoint(seat, seen)
                if seat.at(config.sample.every_steps):
                    self._sample(seat, f"step-{seat.step:06d}")
        if shown:
            self.progress.report(self.done_steps, {name: _total(name, shown) for name in shown[0]})

    def _log(self, seat: Seat, seen: Observed) -> dict[str, float]:
        """The interval's values, written to the subject's sinks."""
        passed = max(time.perf_counter() - seat.begun, 1e-9)
        rate = (seen.step - seat.logged_step) / passed
        seat.values = {
            **seen.values,
            "images_per_s": rate * seat.job.images_a_step,
            "steps_per_s": rate,
            "data_wait_share": seat.wait_s / passed,
            "memory_gib": peak_memory_gib(self.session.world.device),
        }
        for sink in seat.sinks:
            sink.log(seen.step, seat.values)
        seat.begun, seat.wait_s, seat.logged_step = time.perf_counter(), 0.0, seen.step
        self.pack.forget([seat.row])
        return seat.values

    def _checkpoint(self, seat: Seat, seen: Observed) -> None:
        """Copy a row's state; the writer makes a checkpoint of it."""
        job = seat.job
        checkpoint = Checkpoint(seen.step, job.run, self.pack.engine.state(seat.row), seen.average)
        self._write(None, save_checkpoint, job.folder / "checkpoints", checkpoint, job.config.checkpoint.keep)
        self.clock.lap("save", [seat.shares])

    def _sample(self, seat: Seat, name: str) -> Path | None:
        """The sheet of a subject's validation prompts, drawn by the base with its row alone."""
        with only_row(self.session.models.components(self.session.family.denoiser).values(), seat.row):
            sheet = seat.job.sample(name)
        self.clock.lap("sample", [seat.shares])
        return sheet

    def _finish(self, seat: Seat, seen: Observed) -> None:
        """Draw a subject's samples, hand its results to the writer, and make room."""
        job, engine = seat.job, self.pack.engine
        state = engine.state(seat.row)
        if "ema" in state:
            engine.show(seat.row, "ema")
        sheet = self._sample(seat, "samples")
        ran = {"capture": self.pack.runner.choice._asdict()}
        record = {**job.record(seat.values), **ran, "steps": seen.step, "pack_size": self.size}
        self.clock.lap("save", [seat.shares])
        record["stages_s"] = {name: round(seconds, 3) for name, seconds in seat.shares.items()}

        def write() -> dict[str, Any]:
            job.write(state, record, sheet)
            return record

        self._write(job.subject, write)
        self._leave(seat)

    def _fail(self, seat: Seat, seen: Observed) -> None:
        """Report a subject whose numbers went bad; its row still holds the last good state."""
        if seat.job.config.checkpoint.every_steps:
            self._checkpoint(seat, seen)
        self._leave(seat)
        error = (
            f"step {seen.step + 1}: the loss or its gradient is not finite; the state after step {seen.step} is kept. "
        )
        self._tell(seat.job.subject, EngineError(error + "Lower train.lr, set train.clip_norm, or train in fp32"))

    def _leave(self, seat: Seat) -> None:
        self.pack.engine.release(seat.row)
        close(seat.sinks)
        self.writer.submit(seat.job.close)  # after what is still to be written for it
        del self.seats[seat.row]

    def _write(self, subject: Subject | None, work: Callable, *arguments: Any) -> None:
        """Queue work for the writer; the queue is bounded by waiting for its oldest entry."""
        self.pending.append((subject, self.writer.submit(work, *arguments)))
        while len(self.pending) > 2 * self.size:
            self._tell_oldest()

    def _tell_ended(self, wait: bool = False) -> None:
        """Report the subjects whose results are on disk; with `wait`, all that are on their way."""
        while self.pending and (wait or self.pending[0][1].done()):
            self._tell_oldest()
        self.clock.lap("idle" if wait else "save")

    def _tell_oldest(self) -> None:
        subject, written = self.pending.popleft()
        outcome = written.result()
        if subject is not None:
            self._tell(subject, outcome)

    def _tell(self, subject: Subject, outcome: dict[str, Any] | DbtrainError) -> None:
        self.ended += 1
        self.tell(subject, outcome)


def close(sinks: Sequence[Sink]) -> None:
    """Flush and let go of a subject's sinks."""
    for sink in sinks:
        sink.close()


def _total(name: str, shown: Sequence[dict[str, float]]) -> float:
    """A value of the subjects that were just logged: rates add up, everything else is a mean."""
    total = sum(values.get(name, 0.0) for values in shown)
    return total if name.endswith("_per_s") else total / len(shown)
