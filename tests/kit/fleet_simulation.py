"""A cluster without processes: workers that take time, die and come back, driven by the real schedule."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from dbtrain.fleet.causes import stands_alone, verdict_on
from dbtrain.fleet.schedule import Idle, Limits, View, WorkUnit, schedule


@dataclass
class Outcome:
    """What a simulated run came to. busy_s: worker seconds spent on subjects and priors that ended well."""

    makespan_s: float = 0.0
    busy_s: float = 0.0
    finished: Counter = field(default_factory=Counter)
    quarantined: set[int] = field(default_factory=set)
    last_of_class: dict[str, float] = field(default_factory=dict)
    prior_parts: Counter = field(default_factory=Counter)
    units: int = 0
    idle_tail_s: float = 0.0


@dataclass
class Cluster:
    """cost(position): seconds of a subject. poison: subjects that always fail. deaths, births: (second, how many
    workers); a death takes busy workers first."""

    classes: list[str]
    workers: int
    limits: Limits
    cost: Callable[[int], float] = lambda position: 1.0
    speed: Callable[[int], float] = lambda worker: 1.0
    prior_s: float = 20.0
    poison: frozenset[int] = frozenset()
    deaths: tuple[tuple[float, int], ...] = ()
    births: tuple[tuple[float, int], ...] = ()
    seed: int = 0

    def run(self) -> Outcome:
        """The run's outcome; an assertion fails if a subject is given out twice at a time or finishes twice."""
        self.random, self.now, self.out = random.Random(self.seed), 0.0, Outcome()
        self.view = View()
        for position, noun in enumerate(self.classes):
            self.view.add(noun, position)
        self.failures: Counter = Counter()
        self.losses: Counter = Counter()
        self.running: dict[int, str] = {}
        self.alive = {f"w{i}": self.speed(i) for i in range(self.workers)}
        self.at: dict[str, tuple[WorkUnit, int]] = {}
        self.last: dict[str, str] = {}
        self.heap: list = []
        self.tickets = 0
        for second, count in self.deaths:
            self._later(second, "deaths", count)
        for second, count in self.births:
            self._later(second, "births", count)
        self._assign()
        while self.heap and (self.at or not self.view.empty):
            self.now, _, kind, what = heapq.heappop(self.heap)
            getattr(self, f"_{kind}")(what)
            self._assign()
        self.out.makespan_s = self.now
        return self.out

    def _later(self, second: float, kind: str, what: object) -> None:
        self.tickets += 1
        heapq.heappush(self.heap, (second, self.tickets, kind, what))

    def _assign(self) -> None:
        idle = [Idle(name, self.last.get(name)) for name in self.alive if name not in self.at]
        if not idle:
            return
        for name, unit in schedule(self.view, idle, len(self.alive), self.limits):
            self.out.units += 1
            self.last[name] = unit.class_noun
            ticket = self.tickets + 1
            self.at[name] = unit, ticket
            for position in unit.positions:
                assert position not in self.running, f"subject {position} was given out twice"
                self.running[position] = name
            self._later(self.now + self._seconds(unit) / self.alive[name], "end", (name, unit, ticket))

    def _seconds(self, unit: WorkUnit) -> float:
        if unit.kind == "prior":
            return self.prior_s / unit.parts
        return sum(self.cost(position) for position in unit.positions)

    def _end(self, what: tuple[str, WorkUnit, int]) -> None:
        name, unit, ticket = what
        if self.at.get(name) != (unit, ticket):
            return
        del self.at[name]
        self.out.busy_s += self._seconds(unit)
        if unit.kind == "prior":
            self.out.prior_parts[unit.class_noun] += 1
        for position in unit.positions:
            del self.running[position]
            if position in self.poison:
                self._failed(unit, position, "error")
            else:
                self.out.finished[position] += 1
                assert self.out.finished[position] == 1
                self.out.last_of_class[unit.class_noun] = self.now
        self.view.end(unit)

    def _failed(self, unit: WorkUnit, position: int, cause: str) -> None:
        verdict = verdict_on(cause, self.failures[position], self.losses[position], None, 1, self.limits)
        self.failures[position], self.losses[position] = verdict.failures, verdict.losses
        if verdict.state == "waiting":
            self.view.add(unit.class_noun, position, stands_alone(verdict.failures, verdict.losses))
        else:
            self.out.quarantined.add(position)

    def _deaths(self, count: int) -> None:
        names = sorted(self.alive, key=lambda name: (name not in self.at, name))[:count]
        for name in names:
            del self.alive[name]
            if name in self.at:
                unit, _ = self.at.pop(name)
                for number, position in enumerate(unit.positions):
                    del self.running[position]
                    if number == 0:
                        self._failed(unit, position, "lost")
                    else:
                        self.view.add(unit.class_noun, position)
                self.view.end(unit, drawn=False)

    def _births(self, count: int) -> None:
        for i in range(count):
            self.alive[f"b{self.now:g}-{i}"] = 1.0


def tail_efficiency(outcome: Outcome, workers: int) -> float:
    """Share of the workers' time until the last one stopped that went into work."""
    return outcome.busy_s / (workers * outcome.makespan_s)
