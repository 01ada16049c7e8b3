"""Train many subjects in a pack: assign them to rows, train all rows together, end each subject at its own last step,
and reuse its row at once.

While a pack trains, one thread fills the next subjects' banks, and another writes what finished subjects leave behind.
The pack always runs all its rows, so that a subject's result depends on the size of the pack and on nothing else in it.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dbtrain.data.prefetch import ahead
from dbtrain.engines.engine import EngineState
from dbtrain.errors import ConfigError, DbtrainError, EngineError, StopRequested, first_line, reached
from dbtrain.models.sampling import draw_samples, sampling_mode
from dbtrain.packing.pack import Observed, Start, captions_room, make_pack
from dbtrain.packing.seating import Seat, Seating
from dbtrain.packing.size import measured_size
from dbtrain.packing.writing import Writer
from dbtrain.priors.store import prior_key
from dbtrain.results.checkpoint import Checkpoint
from dbtrain.results.record import LAST_SHEET, looks_finished
from dbtrain.storage.trouble import bare
from dbtrain.training.bank import captions_of, complete_priors, stored_priors
from dbtrain.training.identity import subject_config
from dbtrain.training.job import REMEDY, Finished, Job, open_job, sampling_pipeline
from dbtrain.training.session import Base, ClassPriors, Watch, Work
from dbtrain.training.telemetry import Progress
from dbtrain.training.trainables import BEST, final_state, fresh_adapter
from dbtrain.values import Subject

Prepared = tuple[Job, Start]
AT_ONCE = 8
"""Most pictures drawn at once, of all subjects together."""


def train_packed(base: Base, work: Work, watch: Watch, finished: Finished) -> None:
    """Train many subjects at a time; see `train.train_subjects`. `finished` is called from this thread alone."""
    if base.world.size > 1:
        raise ConfigError(
            f"engine.kind: a pack trains in one process, got {base.world.size}; start one `dbtrain train` (or one "
            "fleet worker) a GPU"
        )
    if work.subjects:
        PackedRun(base, work, watch, finished).run()


class PackedRun:
    """The training of some subjects in a pack, from the first bank to the last record."""

    def __init__(self, base: Base, work: Work, watch: Watch, finished: Finished):
        self.base, self.work, self.finished = base, work, finished
        self.clock = watch.clock.continued()
        # What the functions below time for themselves must not count twice.
        self.watch = watch.timed_apart()
        self.configs = [subject_config(base.settings, subject) for subject in work.subjects]
        self.priorless: dict[str, DbtrainError] = {}

    def run(self) -> None:
        """Train every subject; see `train_packed`."""
        begun, packed, subjects = time.perf_counter(), self.base.settings.engine.packed, self.work.subjects
        self._refuse_mixed_priors()
        self._complete_priors()
        self.clock.lap("prior")
        room = captions_room(self.work.index, (subject.id for subject in subjects), self.base.settings.data)
        if packed.size == "auto":
            self.size = measured_size(self.base, self.watch, self.configs, len(subjects), room)
        else:
            self.size = packed.size
        with ExitStack() as ends:
            ends.callback(self.base.restore)
            masked = self.work.index.masked and self.base.settings.data.weighs
            self.pack = make_pack(self.base, self.configs, self.size, room, masked)
            self.seating = Seating(self.pack)
            ends.callback(self.seating.close)
            self.writer = Writer(2 * self.size, self.finished)
            ends.callback(self.writer.close)  # comes first: a subject is ours until its results are written
            self.clock.lap("capture")
            self.common = self.clock.common(len(subjects))
            with closing(ahead(self._prepare, subjects, threads=1, depth=self.size)) as prepared:
                self._train(prepared)
        self.clock.lap("idle")
        spent = "  ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.clock.seconds.items())
        wall_s = time.perf_counter() - begun
        self.watch.say(f"pack: {self.writer.ended} subjects in {wall_s:.1f} s; by stage: {spent}")

    def _refuse_mixed_priors(self) -> None:
        """Raise ConfigError where some subjects have priors and others none, which one pack cannot hold."""
        weight = self.base.settings.prior.weight
        for subject, config in zip(self.work.subjects, self.configs):
            if (config.prior.weight > 0) != (weight > 0):
                raise ConfigError(
                    f"{subject.id}: prior_weight is {config.prior.weight} while prior.weight is 0, and the subjects of "
                    "a pack have priors all or none; set prior.weight, take the column out, or set engine.kind=zero"
                )

    def _complete_priors(self) -> None:
        """Complete the priors of every class that is needed, before the base trains. The error of a class is kept for
        its subjects, and the others go on."""
        base, work, settings = self.base, self.work, self.base.settings
        if not settings.prior.weight > 0:
            return
        todo = [subject for subject in work.subjects if not looks_finished(work.folder(subject))]
        for noun in dict.fromkeys(subject.class_noun for subject in todo):
            key = prior_key(settings, base.models, noun)
            try:
                samples = complete_priors(base, work, self.watch, settings, key)
            except StopRequested:
                raise
            except DbtrainError as error:
                self.priorless |= {subject.id: bare(error) for subject in todo if subject.class_noun == noun}
                continue
            base.class_priors.keep((key, settings.prior.images), ClassPriors(samples))

    def _prepare(self, subject: Subject) -> tuple[Subject, Prepared | dict[str, Any] | DbtrainError]:
        """What a subject trains from, or its record if it is finished, or what keeps it from training. This runs ahead,
        in a thread of its own, and touches nothing that trains."""
        if subject.id in self.priorless:
            return subject, self.priorless[subject.id]
        base = self.base
        try:
            job = open_job(base, self.work, self.watch, subject, stored_priors)
            if isinstance(job, dict):
                return subject, job
            captions = captions_of(base.family, base.models, job.config, job.bank.texts, base.world.device)
            checkpoint = job.checkpoint()
            if checkpoint is None:
                adapter = fresh_adapter(base.family, base.models, job.config, subject.id)
                checkpoint = Checkpoint(0, job.identity.run, {"master": adapter})
        except DbtrainError as error:
            return subject, bare(error)
        except torch.OutOfMemoryError as error:
            return subject, EngineError(f"memory ran out while its photos were encoded: {first_line(error)}")
        return subject, (job, Start(subject.id, job.config, captions, checkpoint))

    def _train(self, prepared: Iterator) -> None:
        seating, stop = self.seating, self.watch.stop
        steps = sum(config.train.steps for config in self.configs)
        self.progress, self.done_steps = Progress(f"pack of {self.size}", steps, 0, self.watch.quiet), 0
        try:
            while self._fill(prepared):
                self._step()
                if stop.asked or any(seat.due.anything for seat in seating):
                    self._settle()
                self._tell_written()
                if stop.asked and self._left():
                    self._tell_written(wait=True)
                    steps_made = {seat.job.subject.id: seat.step for seat in seating}
                    raise StopRequested(
                        f"pack: stopped on request, {len(seating)} subjects under way{reached(steps_made)}; run the "
                        "same command to go on"
                    )
            self._tell_written(wait=True)
        finally:
            self.progress.close()

    def _left(self) -> int:
        """Subjects that train or have not begun."""
        return len(self.work.subjects) - self.writer.ended - self.writer.ending

    def _fill(self, prepared: Iterator) -> bool:
        """Whether any subject sits, after subjects took all free rows."""
        for row in range(self.size):
            while row not in self.seating.seats:
                ready = next(prepared, None)
                if ready is None:
                    break
                subject, what = ready
                shares = dict(self.common)
                self.clock.lap("encode", [shares])
                if isinstance(what, tuple):
                    job, start = what
                    self.seating.seat(row, job, start, shares)
                else:
                    self.writer.tell(subject, what)
        return len(self.seating) > 0

    def _step(self) -> None:
        """Make one step of every subject."""
        self.seating.step()
        self.done_steps += len(self.seating)
        self.progress.advance(self.done_steps)
        self.clock.lap("train", self.seating.shares, self.size)

    def _settle(self) -> None:
        """Do what is due: end subjects, write log lines and checkpoints, draw samples."""
        self._watch([seat for seat in self.seating if seat.due.observe])
        rows = self.pack.observe()
        self.clock.lap("train", self.seating.shares, self.size)
        sound = [seat for seat in self.seating if not rows[seat.row].failed]
        for seat in sound:
            if seat.due.end and seat.due.checkpoint:
                self._checkpoint(seat, rows[seat.row])
        ended = {seat.row: self._last_state(seat) for seat in sound if not rows[seat.row].live}
        sheets = self._draw([seat for seat in sound if seat.row in ended or seat.due.sample], ended)
        shown = []
        for seat in self.seating:
            seen, now = rows[seat.row], seat.due
            if seen.failed:
                self._fail(seat, seen)
                continue
            if now.log or not seen.live:
                shown.append(self.seating.log(seat, seen))
            if not seen.live:
                self._finish(seat, seen, ended[seat.row], sheets.get(seat.row))
                continue
            if now.checkpoint or self.watch.stop.asked:
                self._checkpoint(seat, seen)
        if shown:
            self.progress.report(self.done_steps, {name: _total(name, shown) for name in shown[0]})

    def _watch(self, seats: Sequence[Seat]) -> None:
        """Observe what `train.stop` watches of these subjects, and end those that no longer get better."""
        if not seats:
            return
        self.pack.observe()  # waits for the steps, whose time is not that of observing
        self.clock.lap("train", self.seating.shares, self.size)
        losses, engine = self.pack.fixed_losses({seat.row: seat.job.bank for seat in self.seating}), self.pack.engine
        for seat in seats:
            weights = partial(lambda row: final_state(engine.state(row)), seat.row)
            if seat.job.watched.observe(seat.step, losses[seat.row], weights):
                engine.release(seat.row)
                seat.job.tell_end()
        self.clock.lap("stop", [seat.shares for seat in seats])

    def _checkpoint(self, seat: Seat, seen: Observed) -> None:
        """Copy a row's state, and let the writer make a checkpoint of it."""
        job = seat.job
        self.writer.write(None, job.save, job.snapshot(self.pack.engine, seen.step, seat.row, seen.average))
        self.clock.lap("save", [seat.shares])

    def _last_state(self, seat: Seat) -> EngineState:
        """The state of a subject that has ended; its row then computes with what is published."""
        state = self.pack.engine.state(seat.row) | seat.job.watched.best
        if BEST in state or "ema" in state:
            self.pack.engine.put(seat.row, final_state(state))
        return state

    def _draw(self, seats: Sequence[Seat], ended: Container[int]) -> dict[int, Path]:
        """The sheets by row of these subjects' validation prompts, all drawn together, each with its own row."""
        base, settings = self.base, self.base.settings
        asked = [(seat, prompt) for seat in seats for prompt in seat.job.prompts]
        if not asked:
            return {}
        each = len(seats[0].job.prompts)
        chosen = (settings.sample, settings.data.resolution, settings.train.precision)
        jobs, own = [seat.job for seat in seats], [seat.row for seat in seats]
        with sampling_mode(base.models), sampling_pipeline(jobs, own) as pipeline:
            rows = draw_samples(
                pipeline,
                [prompt for _, prompt in asked],
                *chosen,
                batch=min(AT_ONCE, self.size * each * settings.sample.images),
                rows=[seat.row for seat, _ in asked],
            )
        sheets = {}
        for number, seat in enumerate(seats):
            name = LAST_SHEET if seat.row in ended else f"step-{seat.step:06d}"
            sheets[seat.row] = seat.job.publish_samples(rows[number * each : (number + 1) * each], name)
        self.clock.lap("sample", [seat.shares for seat in seats])
        return sheets

    def _finish(self, seat: Seat, seen: Observed, state: EngineState, sheet: Path | None) -> None:
        """Hand a subject's results to the writer, and make its row free."""
        job = seat.job
        record = {**job.record(seat.values, self.pack.runner.choice), "steps": seen.step, "pack_size": self.size}
        self.clock.lap("save", [seat.shares])
        record["stages_s"] = {name: round(seconds, 3) for name, seconds in seat.shares.items()}

        def write() -> dict[str, Any]:
            job.write(state, record, sheet)
            return record

        self.writer.write(job.subject, write)
        self._leave(seat)

    def _fail(self, seat: Seat, seen: Observed) -> None:
        """Report a subject that met a NaN or an infinity; its row still holds the last good state."""
        if seat.job.config.checkpoint.every_steps:
            self._checkpoint(seat, seen)
        self._leave(seat)
        what = f"step {seen.step + 1}: the loss or its gradient is not finite; the state after step {seen.step} is kept"
        self.writer.tell(seat.job.subject, EngineError(f"{what}. {REMEDY}"))

    def _leave(self, seat: Seat) -> None:
        self.seating.leave(seat)
        self.writer.afterwards(seat.job.close)  # others may train the subject once all is written for it

    def _tell_written(self, wait: bool = False) -> None:
        self.writer.tell_written(wait)
        self.clock.lap("idle" if wait else "save")


def _total(name: str, shown: list[dict[str, float]]) -> float:
    """A value of the subjects that were just logged: rates add up, everything else is a mean."""
    total = sum(values.get(name, 0.0) for values in shown)
    return total if name.endswith("_per_s") else total / len(shown)
