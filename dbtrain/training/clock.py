"""Wall time by stage: load, prior, encode, train, sample, save, ..."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of wall time by stage, in `seconds`. `beat` is called with the name of each stage.

    A subject that trains alone times each stage with `stage`; what lies between two stages is not counted. A pack cuts
    all its time into laps with `lap`, so that its stages sum to the wall time.
    """

    def __init__(
        self, beat: Callable[[str], None] = lambda stage: None, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.seconds: dict[str, float] = {}
        self.beat, self.now = beat, now
        self.last = now()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of a block to a stage."""
        self.beat(name)
        begun = self.now()
        try:
            yield
        finally:
            _add(self.seconds, name, self.now() - begun)

    def lap(self, stage: str, owners: Iterable[dict[str, float]] = (), rows: int | None = None) -> float:
        """Seconds since the last lap, added to a stage and in equal shares to its owners.

        rows: number of rows that ran in this time. The part of the rows without an owner is added as `idle`. None: all
        of the time is the owners'.
        """
        now, owners = self.now(), list(owners)
        passed, self.last = now - self.last, now
        used = passed * len(owners) / rows if rows else passed
        for name, seconds in ((stage, used), ("idle", passed - used)):
            if seconds:
                _add(self.seconds, name, seconds)
                for share in owners:
                    _add(share, name, seconds / len(owners))
        self.beat(stage)
        return passed

    def continued(self) -> Clock:
        """A clock that has the seconds counted so far and begins its first lap now; this clock is empty afterwards."""
        clock = Clock(self.beat, self.now)
        clock.seconds, self.seconds = self.seconds, {}
        return clock

    def common(self, subjects: int) -> dict[str, float]:
        """The share of each of so many subjects in everything until now."""
        return {stage: seconds / subjects for stage, seconds in self.seconds.items()}


def _add(table: dict[str, float], stage: str, seconds: float) -> None:
    table[stage] = table.get(stage, 0.0) + seconds
