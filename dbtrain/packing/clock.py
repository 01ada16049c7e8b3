"""Wall time by stage: every moment of a pack belongs to one stage, and to the subjects that it was spent on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from dbtrain.training.telemetry import Stages


class Clock:
    """Time since the last lap goes to the stage that the lap names, so that the stages sum to the wall.

    stages: the totals, begun with what was spent before. Its subjects' shares sum to them, but for what comes after the
    last subject's end.
    """

    def __init__(self, stages: Stages, before: Mapping[str, float], now: Callable[[], float] = time.perf_counter):
        self.stages, self.now = stages, now
        for stage, seconds in before.items():
            self._add(stages.seconds, stage, seconds)
        self.last = now()

    def lap(self, stage: str, owners: Iterable[dict[str, float]] = (), rows: int | None = None) -> float:
        """Seconds since the last lap, added to a stage and in equal shares to its owners.

        rows: of so many rows only the owners' were of use; the rest of the time is idle.
        """
        now, owners = self.now(), list(owners)
        passed, self.last = now - self.last, now
        used = passed * len(owners) / rows if rows else passed
        for name, seconds in ((stage, used), ("idle", passed - used)):
            if seconds:
                self._add(self.stages.seconds, name, seconds)
                for share in owners:
                    self._add(share, name, seconds / len(owners))
        self.stages.beat(stage)
        return passed

    @staticmethod
    def _add(table: dict[str, float], stage: str, seconds: float) -> None:
        table[stage] = table.get(stage, 0.0) + seconds

    def common(self, subjects: int) -> dict[str, float]:
        """The share of each of so many subjects in everything until now."""
        return {stage: seconds / subjects for stage, seconds in self.stages.seconds.items()}
