"""Who does what next: a function of what waits, which workers are idle and a few limits.

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
    newest: bool = False
    """Whether every second unit takes the newest subjects, so that those who join start at once, and the others go on
    at no less than half the speed."""
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
    turn: int = 0
    """How many units of training, retries left out, have begun."""

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
        """Note that a unit is under way, with the parts of its class's priors if they are new."""
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
            self.turn += unit.kind == "train"
            for position in unit.positions:
                if queue[0] == position:
                    queue.popleft()
                else:
                    queue.remove(position)

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
    """A unit for each idle worker that has something to do, by the worker's name. The view has them under way."""
    choice = _Choice(view, max(1, alive), limits)
    units: list[tuple[str, WorkUnit]] = []
    free = deque(idle)
    while free and (part := choice.prior(len(free))):
        view.begin(part)
        units.append((free.popleft().name, part))
    for worker in free:
        unit = choice.retry() or choice.train(worker) or choice.after(worker)
        if unit is None:
            break  # What there is does not depend on who asks.
        view.begin(unit)
        units.append((worker.name, unit))
    return units


@dataclass(frozen=True)
class _Choice:
    """What may begin next, by a view in which everything that was given out is under way. alive: workers."""

    view: View
    alive: int
    limits: Limits

    def ready(self, class_noun: str) -> bool:
        return not self.limits.prior_parts or self.view.priors[class_noun].ready

    def prior(self, free: int) -> WorkUnit | None:
        """A part of a class's priors: of those begun, else of a new class if trainable subjects would run out or no
        priors are under way. free: workers that have nothing to do."""
        view = self.view
        if not self.limits.prior_parts:
            return None
        for noun, priors in view.priors.items():
            if priors.todo:
                return WorkUnit("prior", noun, part=priors.todo[0], parts=priors.parts)
        pending = [noun for noun in view.priors if self._pending(noun)]
        ready = sum(len(queue) for noun, queue in view.waiting.items() if self.ready(noun))
        drawing = any(priors.drawing for priors in view.priors.values())
        if not pending or (drawing and ready >= 2 * self.alive * self.limits.pack):
            return None
        noun = max(pending, key=lambda pending_noun: len(view.waiting[pending_noun]))
        return WorkUnit("prior", noun, parts=max(1, min(self.limits.prior_parts, free // len(pending))))

    def _pending(self, noun: str) -> bool:
        wanted = self.view.waiting.get(noun) or any(entry[0] == noun for entry in self.view.alone)
        return bool(wanted) and not self.view.priors[noun].parts

    def retry(self) -> WorkUnit | None:
        """A failed subject alone, while few enough workers do that."""
        view = self.view
        allowed = max(1, int(self.alive * self.limits.retry_share)) if any(view.waiting.values()) else self.alive
        entry = next((entry for entry in view.alone if self.ready(entry[0])), None)
        if entry is None or view.retrying >= allowed:
            return None
        noun, position = entry
        return WorkUnit("train", noun, (position,), self._pack(position), retry=True)

    def train(self, worker: Idle) -> WorkUnit | None:
        """The next subjects in storage order of the worker's own class, else of the class with most left a worker."""
        waiting = self.view.waiting
        newest = self.limits.newest and self.view.turn % 2 == 1
        noun = self._class_of_newest() if newest else self._class(worker, waiting)
        if noun is None:
            return None
        queue = reversed(waiting[noun]) if newest else waiting[noun]
        size = unit_size(sum(map(len, waiting.values())), self.alive, self.limits)
        pack = self._pack(waiting[noun][-1 if newest else 0])
        same = takewhile(lambda position: self._pack(position) == pack, islice(queue, size))
        return WorkUnit("train", noun, tuple(sorted(same)), pack)

    def _class_of_newest(self) -> str | None:
        """The class of the subject that joined last, of those that can be trained now."""
        last = {noun: queue[-1] for noun, queue in self.view.waiting.items() if queue and self.ready(noun)}
        return max(last, key=lambda noun: last[noun], default=None)

    def _pack(self, position: int) -> int:
        """Rows of the pack that a subject trains in. Never fewer because few are left: the last bits of a result depend
        on the rows, and must not depend on the number of workers."""
        return min(self.limits.pack, self.view.limit.get(position, self.limits.pack))

    def after(self, worker: Idle) -> WorkUnit | None:
        """Finished subjects to draw and score."""
        finished = self.view.after
        noun = self._class(worker, finished, trained=True)
        if noun is None:
            return None
        size = math.ceil(sum(map(len, finished.values())) / self.alive / 4)
        return WorkUnit("after", noun, tuple(islice(finished[noun], size)))

    def _class(self, worker: Idle, queues: dict[str, deque[int]], trained: bool = False) -> str | None:
        left = {noun: len(queue) for noun, queue in queues.items() if queue and (trained or self.ready(noun))}
        if worker.last_class in left:
            return worker.last_class
        return max(left, key=lambda noun: left[noun] / (self.view.busy[noun] + 1), default=None)


def unit_size(left: int, alive: int, limits: Limits) -> int:
    """Subjects of the next unit when `left` wait for `alive` workers, in whole packs."""
    share = min(limits.unit, left / (alive * limits.rounds))
    return limits.pack * max(1, int(share / limits.pack))
