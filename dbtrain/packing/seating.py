"""Which subject sits in which row of a pack, how far it has come, and what is due for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dbtrain.packing.pack import Observed, Pack, Start
from dbtrain.training.cadence import Due, due
from dbtrain.training.job import Job
from dbtrain.training.telemetry import Meter, Sink, open_sinks, peak_memory_gib


@dataclass
class Seat:
    """A subject in its row. shares: seconds by stage that were spent on it. step: steps asked of the device; a row that
    stopped early makes fewer. logged: steps made at the last log line. values: those of that line."""

    row: int
    job: Job
    shares: dict[str, float]
    sinks: Sequence[Sink]
    step: int
    logged: int
    wait_s: float = 0.0
    meter: Meter = field(default_factory=Meter)
    values: dict[str, float] = field(default_factory=dict)

    @property
    def due(self) -> Due:
        """What is due for the subject after its last step."""
        return due(self.step, self.job.config)


class Seating:
    """The subjects in the rows of a pack."""

    def __init__(self, pack: Pack):
        self.pack = pack
        self.seats: dict[int, Seat] = {}

    def __len__(self) -> int:
        """Number of subjects that sit."""
        return len(self.seats)

    def __iter__(self) -> Iterator[Seat]:
        """A copy of the occupied rows; rows may be freed during the loop."""
        return iter(list(self.seats.values()))

    @property
    def shares(self) -> list[dict[str, float]]:
        """What was spent on each subject that sits."""
        return [seat.shares for seat in self]

    def seat(self, row: int, job: Job, start: Start, shares: dict[str, float]) -> None:
        """Let a subject train in a row that is free."""
        self.pack.seat(row, start)
        sinks = open_sinks(job.config, job.folder, job.subject.id)
        self.seats[row] = Seat(row, job, shares, sinks, start.checkpoint.step, start.checkpoint.step)

    def step(self) -> None:
        """Make one step of every subject."""
        begun, seats = time.perf_counter(), list(self)
        batch = self.pack.batch([(seat.row, seat.job.bank, seat.step) for seat in seats])
        wait_s = time.perf_counter() - begun
        self.pack.step(batch)
        for seat in seats:
            seat.step, seat.wait_s = seat.step + 1, seat.wait_s + wait_s
        # A GPU is still busy. What is due now may wait for it, and would leave it idle while a batch is drawn.
        going = (seat for seat in seats if seat.step < seat.job.config.train.steps)
        self.pack.draw_ahead((seat.row, seat.job.bank, seat.step) for seat in going)

    def log(self, seat: Seat, seen: Observed) -> dict[str, float]:
        """The interval's values, after they were written to the subject's sinks."""
        made, meter = seen.step - seat.logged, seat.meter
        meter.add(made * seat.job.images_a_step, seat.wait_s, {}, made)
        seen_values = {**seen.values, **seat.job.watched.values}
        seat.values = {**seen_values, **meter.read(), "memory_gib": peak_memory_gib(self.pack.device)}
        for sink in seat.sinks:
            sink.log(seen.step, seat.values)
        job = seat.job
        job.watch.logged(job.subject.id, seen.step, job.config.train.steps, seat.values)
        meter.reset()
        seat.wait_s, seat.logged = 0.0, seen.step
        self.pack.forget([seat.row])
        return seat.values

    def leave(self, seat: Seat) -> None:
        """Make a subject's row free."""
        self.pack.engine.release(seat.row)
        del self.seats[seat.row]
        for sink in seat.sinks:
            sink.close()

    def close(self) -> None:
        """Close all subjects' logs and locks without using the device."""
        for seat in self:
            for sink in seat.sinks:
                sink.close()
            seat.job.close()
