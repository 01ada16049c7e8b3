"""Who does what next: a pure function of what waits, which workers are idle and a few limits.

Units are guided (Polychronopoulos & Kuck 1987): each takes a fixed part of a worker's fair share of what is left, so
they are long at first and short at the end, where all workers should stop together. A unit keeps to one class, because
its subjects share priors, and to storage order, because shards are then read from front to back.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Literal


@dataclass(frozen=True)
class Limits:
    """What the plan may use."""

    pack: int = 1
    """Rows of a pack: subjects that a worker trains together. A pack runs all its rows, taken or not, so units are
    whole packs."""
    unit: int = 64
    """Most subjects in a unit."""
    rounds: int = 8
    """A unit is 1/rounds of a worker's fair share of what is left."""
    tries: int = 3
    """Failures of its own after which a subject is quarantined."""
    losses: int = 100
    """Attempts that a subject may lose to causes outside it (killed workers, lost nodes) before it is quarantined."""
    retry_share: float = 0.25
    """Largest share of the workers that retry failed subjects while fresh ones wait; a single worker always may."""
    prior_parts: int = 1
    """Most parts that a class's priors are split into; 0 if none are needed."""


@dataclass(frozen=True)
class WorkUnit:
    """What one worker does next. `prior` draws part `part` of `parts` of a class's priors; `train` trains subjects, by
    their positions, in a pack of `pack` rows; `after` generates and evaluates for finished ones."""

    kind: Literal["prior", "train", "after"]
    class_noun: str
    positions: tuple[int, ...] = ()
    pack: int = 1
    part: int = 0
    parts: int = 1
    retry: bool = False


@dataclass(frozen=True)
class Idle:
    """A worker without work, and the class it worked on last."""

    name: str
    last_class: str | None = None


@dataclass
class Priors:
    """A class's priors: the parts that no worker draws yet (`todo`), and how many are being drawn."""

    parts: int = 0
    todo: deque[int] = field(default_factory=deque)
    drawing: int = 0
    failures: int = 0

    @property
    def ready(self) -> bool:
        """Whether all parts are drawn."""
        return self.parts > 0 and not self.todo and not self.drawing


@dataclass
class View:
    """In-memory copy of the ledger's open work."""

    waiting: dict[str, deque[int]] = field(default_factory=dict)
    alone: deque[tuple[str, int]] = field(default_factory=deque)
    after: dict[str, deque[int]] = field(default_factory=dict)
    priors: dict[str, Priors] = field(default_factory=dict)
    limit: dict[int, int] = field(default_factory=dict)
    """Smaller packs for subjects that ran out of memory."""
    busy: Counter[str] = field(default_factory=Counter)
    """Workers at each class."""
    retrying: int = 0

    def add(self, class_noun: str, position: int, alone: bool = False, pack: int | None = None) -> None:
        """Add a subject that waits: with others of its class, or to be tried alone. pack: most rows of its packs."""
        self.priors.setdefault(class_noun, Priors())
        queue = self.waiting.setdefault(class_noun, deque())
        self.limit.pop(position, None)
        if pack is not None:
            self.limit[position] = pack
        if alone:
            self.alone.append((class_noun, position))
        else:
            put(queue, position)

    def add_finished(self, class_noun: str, position: int) -> None:
        """Add a finished subject that waits to be drawn or scored."""
        put(self.after.setdefault(class_noun, deque()), position)

    def remove(self, positions: set[int]) -> None:
        """Remove subjects that wait no longer."""
        for queue in (*self.waiting.values(), *self.after.values()):
            kept = [position for position in queue if position not in positions]
            queue.clear()
            queue.extend(kept)
        self.alone = deque(entry for entry in self.alone if entry[1] not in positions)

    def begin(self, unit: WorkUnit) -> None:
        """Note that a unit of `schedule` is under way."""
        self.busy[unit.class_noun] += 1
        if unit.kind == "prior":
            priors = self.priors[unit.class_noun]
            if not priors.parts:
                priors.parts, priors.todo = unit.parts, deque(range(unit.parts))
            priors.todo.remove(unit.part)
            priors.drawing += 1
        elif unit.retry:
            self.alone.remove((unit.class_noun, unit.positions[0]))
            self.retrying += 1
        else:
            queue = (self.waiting if unit.kind == "train" else self.after)[unit.class_noun]
            for _ in unit.positions:
                queue.popleft()

    def end(self, unit: WorkUnit, drawn: bool = True) -> None:
        """Note that a unit is over; what is left of it was given back with `add`. drawn: a prior's part is there."""
        self.busy[unit.class_noun] -= 1
        self.retrying -= unit.retry
        if unit.kind == "prior":
            priors = self.priors[unit.class_noun]
            priors.drawing -= 1
            if not drawn:
                priors.todo.append(unit.part)

    @property
    def empty(self) -> bool:
        """Whether nothing waits (something may still be under way)."""
        return not self.alone and not any(self.waiting.values()) and not any(self.after.values())


def put(queue: deque[int], position: int) -> None:
    """Insert a position into a queue in storage order."""
    if not queue or position > queue[-1]:
        queue.append(position)
    else:
        insort(queue, position)


def schedule(view: View, idle: Sequence[Idle], alive: int, limits: Limits) -> list[tuple[str, WorkUnit]]:
    """A unit for each idle worker that has something to do, by the worker's name. Changes nothing."""
    choice = _Choice(view, max(1, alive), limits)
    units: list[tuple[str, WorkUnit]] = []
    free = deque(idle)
    while free and (parts := choice.priors(len(free))):
        units += [(free.popleft().name, part) for part in parts]
    for worker in free:
        unit = choice.retry() or choice.train(worker) or choice.after(worker)
        if unit is None:
            break  # What there is does not depend on who asks.
        units.append((worker.name, unit))
    return units


class _Choice:
    """One call of `schedule`: the view, and what this call has given out already."""

    def __init__(self, view: View, alive: int, limits: Limits):
        self.view, self.alive, self.limits = view, alive, limits
        self.taken: Counter[str] = Counter()
        self.taken_after: Counter[str] = Counter()
        self.busy = Counter(view.busy)
        self.begun: set[str] = set()
        self.redone: Counter[str] = Counter()
        self.retried = 0
        self.left = sum(map(len, view.waiting.values()))
        self.drawing = sum(priors.drawing for priors in view.priors.values())

    def ready(self, class_noun: str) -> bool:
        return not self.limits.prior_parts or self.view.priors[class_noun].ready

    def priors(self, free: int) -> list[WorkUnit]:
        """Parts of one class's priors, if trainable subjects would run out or no priors are under way."""
        if not self.limits.prior_parts:
            return []
        for noun, priors in self.view.priors.items():
            if self.redone[noun] < len(priors.todo):
                part = priors.todo[self.redone[noun]]
                self.redone[noun] += 1
                return [self._busy(WorkUnit("prior", noun, part=part, parts=priors.parts))]
        pending = [noun for noun in self.view.priors if self._pending(noun)]
        ready = sum(len(queue) - self.taken[noun] for noun, queue in self.view.waiting.items() if self.ready(noun))
        if not pending or (self.drawing and ready >= 2 * self.alive * self.limits.pack):
            return []
        noun = max(pending, key=lambda pending_noun: len(self.view.waiting[pending_noun]))
        parts = max(1, min(self.limits.prior_parts, free // len(pending)))
        self.begun.add(noun)
        self.drawing += parts
        return [self._busy(WorkUnit("prior", noun, part=part, parts=parts)) for part in range(parts)]

    def _pending(self, noun: str) -> bool:
        wanted = self.view.waiting.get(noun) or any(entry[0] == noun for entry in self.view.alone)
        return bool(wanted) and not self.view.priors[noun].parts and noun not in self.begun

    def retry(self) -> WorkUnit | None:
        """A failed subject alone, while few enough workers do that."""
        running = self.view.retrying + self.retried
        allowed = max(1, int(self.alive * self.limits.retry_share)) if self.left > self.taken.total() else self.alive
        entries = [entry for entry in self.view.alone if self.ready(entry[0])] if self.view.alone else []
        if running >= allowed or self.retried >= len(entries):
            return None
        noun, position = entries[self.retried]
        self.retried += 1
        return self._busy(WorkUnit("train", noun, (position,), self._pack(position), retry=True))

    def train(self, worker: Idle) -> WorkUnit | None:
        """The next subjects in storage order of the worker's own class, else of the class with most left a worker."""
        noun = self._class(worker, self.view.waiting, self.taken)
        if noun is None:
            return None
        queue, start = self.view.waiting[noun], self.taken[noun]
        size = unit_size(self.left - self.taken.total(), self.alive, self.limits)
        pack = self._pack(queue[start])
        positions = tuple(takewhile(lambda position: self._pack(position) == pack, islice(queue, start, start + size)))
        self.taken[noun] += len(positions)
        return self._busy(WorkUnit("train", noun, positions, pack))

    def _pack(self, position: int) -> int:
        """Rows of the pack that a subject trains in. Never fewer because few are left: the last bits of a result depend
        on the rows, and must not depend on the number of workers."""
        return min(self.limits.pack, self.view.limit.get(position, self.limits.pack))

    def after(self, worker: Idle) -> WorkUnit | None:
        """Finished subjects to draw and score."""
        noun = self._class(worker, self.view.after, self.taken_after, trained=True)
        if noun is None:
            return None
        left = sum(map(len, self.view.after.values())) - self.taken_after.total()
        start = self.taken_after[noun]
        positions = tuple(islice(self.view.after[noun], start, start + math.ceil(left / self.alive / 4)))
        self.taken_after[noun] += len(positions)
        return self._busy(WorkUnit("after", noun, positions))

    def _class(self, worker: Idle, queues: dict[str, deque[int]], taken: Counter, trained: bool = False) -> str | None:
        left = {
            noun: len(queue) - taken[noun]
            for noun, queue in queues.items()
            if len(queue) > taken[noun] and (trained or self.ready(noun))
        }
        if worker.last_class in left:
            return worker.last_class
        return max(left, key=lambda noun: left[noun] / (self.busy[noun] + 1), default=None)

    def _busy(self, unit: WorkUnit) -> WorkUnit:
        self.busy[unit.class_noun] += 1
        return unit


def unit_size(left: int, alive: int, limits: Limits) -> int:
    """Subjects of the next unit when `left` wait for `alive` workers, in whole packs."""
    share = min(limits.unit, left / (alive * limits.rounds))
    return limits.pack * max(1, int(share / limits.pack))
