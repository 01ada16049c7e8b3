"""The driver: gives waiting subjects to idle workers and enters what becomes of them, until nothing is left to do.

It alone writes the ledger. Everything it must not lose is there before the next thing happens, so it may be killed at
any moment: the same command goes on. One loop, no threads: schedule -> wait for news -> one commit -> again.
"""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import ray

from dbtrain.data.index import Index
from dbtrain.errors import FleetError, StopRequested
from dbtrain.fleet.books import Books, Flight
from dbtrain.fleet.cluster import has_gpus, room
from dbtrain.fleet.crew import Crew, Lost, Shape
from dbtrain.fleet.folder import mark
from dbtrain.fleet.gauges import Gauges
from dbtrain.fleet.inbox import take_requests
from dbtrain.fleet.ledger import Ledger, find_ledger
from dbtrain.fleet.run import Options
from dbtrain.fleet.schedule import Idle, Settings, schedule
from dbtrain.fleet.status import Screen, summarize
from dbtrain.fleet.trainer import Message, Order, Task
from dbtrain.priors.store import BLOCK
from dbtrain.settings.config import RunConfig

TICK_S = 1.0
GROW_S = 5.0
"""Seconds between heartbeats, and between looks at what the cluster holds."""
UNPLACED = 10
"""Actors that may die before they answer once, with none that ever worked in between."""
BAD_STARTS = 3
"""Trainers of one crew that may fail to load the base, one after another."""
REFUSED = 5
"""Subjects in a row, with none finished in between, whose files are refused: then it is the disk and not theirs."""
NO_START = ("killed", "stopped", "disk")
"""Ends of a trainer that say nothing of the next start, or end the run anyway."""


class Driver:
    """One run under way."""

    def __init__(self, ledger: Ledger, index: Index, config: RunConfig, out: Path, options: Options):
        self.ledger, self.index, self.config, self.out, self.options = ledger, index, config, out.resolve(), options
        self.pack = pack_of(config) if options.gang == 1 else 1
        blocks = -(-config.prior.images // BLOCK) if config.prior.weight > 0 else 0
        settings = Settings(self.pack, config.engine.packed.size != "auto", options.unit * self.pack,
                            tries=options.tries, losses=options.losses,
                            prior_parts=min(blocks, 1) if options.gang > 1 else blocks)  # fmt: skip
        self.token = mark(self.out)
        self.screen, self.gauges = Screen(out, options.quiet), Gauges()
        self.books = Books(ledger, settings, options.asked, self.screen)
        self.shape = Shape(options.gang, 0, options.cpus, options.hang_s)
        self.crews: dict[str, Crew] = {}
        self.flights: dict[int, Flight] = {}
        self.bad_starts: dict[str, int] = {}
        self.made = self.units = 0
        self.cramped = False
        self.stopping: str | None = None
        self.disk: str | None = None
        self.refused: set[int] = set()
        self.unplaced = 0

    def drive(self) -> None:
        """Work until nothing waits, or a stop is asked for."""
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(name, lambda number, _: setattr(self, "stopping", signal.Signals(number).name))
        slow = fast = 0.0
        ended = "failed"
        try:
            while self.flights or not (self.books.view.empty or self.stopping or self.disk):
                now = time.monotonic()
                if now - slow > GROW_S:
                    slow = now
                    self.grow()
                if now - fast > TICK_S:
                    fast = now
                    self.tick()
                if self.stopping or self.disk:
                    self.wind_down()
                    break
                self.assign()
                self.listen(0.2)
            ended = "stopped" if self.stopping or self.disk else "done"
        finally:
            self.conclude(ended)
        if self.disk:
            raise FleetError(f"{self.out}: {self.disk}")
        if self.stopping:
            left = self.ledger.counts()["waiting"]
            raise StopRequested(f"stopped on request ({self.stopping}), {left} subjects wait; the same command goes on")

    def conclude(self, ended: str) -> None:
        """Leave nothing at work, and the ledger and the terminal as they should be."""
        for crew in self.crews.values():
            crew.kill()
        # What ended the run may be a ledger that takes no more; that is told already.
        with suppress(FleetError) if ended == "failed" else nullcontext(), self.ledger.commit():
            self.ledger.take_over()
            self.ledger.beat(ended)
        self.screen.close(summarize(self.ledger))

    def grow(self) -> None:
        """As many crews as were asked for or as the cluster has room for; of GPUs, as soon as there are any."""
        if not self.shape.gpus and has_gpus():
            self.shape = replace(self.shape, gpus=self.options.gpus)
            for crew in list(self.crews.values()):
                self.drop(crew, "lost", "GPUs have joined, which take its place")
        members = room(self.shape.gpus, self.shape.cpus)
        self.warn_of_room(members)
        wanted = self.options.workers or max(1, members // self.shape.size)
        while len(self.crews) < wanted:
            self.made += 1
            name = f"worker-{self.made:03d}"
            task = Task(self.config.model_dump(mode="json"), str(self.out), self.pack, dict(self.options.evaluation),
                        token=self.token)  # fmt: skip
            self.crews[name] = Crew(name, self.shape, task)

    def warn_of_room(self, members: int) -> None:
        """Say once that nobody can work, and once more if that comes again."""
        if (members < self.shape.size) != self.cramped:
            self.cramped = not self.cramped
            each = f"{self.shape.cpus:g} CPUs" + (f" and {self.shape.gpus:g} GPUs" if self.shape.gpus else "")
            if self.cramped:
                self.screen.say(
                    f"waiting for machines: want room for {self.shape.size} workers of {each} each, the cluster has it "
                    f"for {members}; let machines join, or lower --cpus or --gang"
                )

    def tick(self) -> None:
        """Heartbeat, requests from other terminals, workers that do not answer, what is shown."""
        for crew in [crew for crew in self.crews.values() if crew.overdue()]:
            self.lose(crew, f"did not answer for {self.options.hang_s:g} s")
        self.books.obey(take_requests(self.ledger, find_ledger(self.out)))
        with self.ledger.commit():
            self.ledger.beat("running")
            for crew in self.crews.values():
                self.ledger.note_worker(crew.row())
            summary = summarize(self.ledger)
        self.screen.show(summary)
        self.gauges.show(summary)

    def assign(self) -> None:
        """Give every idle crew a unit, if there is one; the ledger knows it first."""
        idle = [crew for crew in self.crews.values() if crew.state == "idle"]
        if not idle:
            return
        alive = sum(crew.state != "placing" for crew in self.crews.values())
        view, settings = self.books.view, self.books.settings
        given = schedule(view, [Idle(crew.name, crew.last_class) for crew in idle], alive, settings)
        orders = []
        with self.ledger.commit():
            for name, unit in given:
                self.units += 1
                number, crew = self.units, self.crews[name]
                opened = self.ledger.start(number, unit.positions, name) if unit.kind == "train" else {}
                opened = opened or dict.fromkeys(unit.positions, 0)
                self.flights[number] = Flight(unit, crew, opened, unit.pack)
                specs = tuple(self.ledger.specs(unit.positions))
                rows = tuple(row for spec in specs for row in self.index.entries_of(spec["id"]))
                after = tuple(tuple(self.books.todo.get(position, ())) for position in unit.positions)
                orders.append((crew, Order(number, unit, specs, rows, after)))
                view.begin(unit)
        for crew, order in orders:
            crew.give(order)

    def listen(self, wait_s: float) -> None:
        """Take in all news there are, in one commit."""
        calls = {call: crew for crew in self.crews.values() for call in crew.pending}
        if not calls:
            time.sleep(wait_s)
            return
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=wait_s)
        if not ready:
            return
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        lost = []
        with self.ledger.commit():
            for call in ready:
                crew = calls[call]
                try:
                    for event in crew.accept(call) if call in crew.pending else []:
                        HANDLERS[event[0]](self, crew, event)
                except Lost as error:
                    lost.append((crew, str(error)))
        for crew, why in lost:
            self.lose(crew, why)

    def on_ready(self, crew: Crew, event: Message) -> None:
        """A trainer has loaded the base."""
        self.bad_starts.pop(crew.name, None)
        self.unplaced = 0
        if not self.ledger.same_base(event[1]):
            raise FleetError(
                f"{self.out}: holds a run of another base than {self.config.model.path}; use another --out"
            )

    def on_finished(self, crew: Crew, event: Message) -> None:
        """A subject's files are published and verified."""
        _, number, position, result = event
        self.refused.clear()
        self.books.finish(self.flights[number], position, result)

    def on_packed(self, crew: Crew, event: Message) -> None:
        """A trainer has measured how many subjects it trains at a time."""
        _, number, size = event
        self.flights[number].pack = size

    def on_failed(self, crew: Crew, event: Message) -> None:
        """A subject failed by itself and its trainer goes on."""
        _, number, position, cause, reason, seconds = event
        cause = self.sift(cause, reason, [position])
        self.books.retire(self.flights[number], position, cause, reason, seconds)

    def on_after(self, crew: Crew, event: Message) -> None:
        """A finished subject is drawn or scored, or could not be."""
        _, number, position, name, outcome = event
        if self.books.note_after(position, name, outcome):
            self.flights[number].open.pop(position)

    def on_done(self, crew: Crew, event: Message) -> None:
        """A unit is over."""
        _, number, seconds = event
        crew.unit = None
        self.books.close(self.flights.pop(number), seconds * self.shape.size)

    def on_died(self, crew: Crew, event: Message) -> None:
        """A crew's trainer is dead; the crew has begun to start another."""
        _, cause, reason = event
        at_work = [position for flight in self.flights.values() if flight.crew is crew for position in flight.open]
        cause = self.sift(cause, reason, at_work[:1])
        if not self.abandon(crew, cause, reason) and cause not in NO_START:
            self.bad_starts[crew.name] = self.bad_starts.get(crew.name, 0) + 1
            if self.bad_starts[crew.name] >= BAD_STARTS:
                raise FleetError(f"{crew.name}: its trainer cannot start: {reason}; see {self.out / 'logs'}")

    def sift(self, cause: str, reason: str, positions: list[int]) -> str:
        """The cause of an end. `disk` ends the run, and is also what a refused file is that is no subject's own, or the
        latest of too many. positions: of the subject that was at work, if one was."""
        if cause == "file":
            self.refused.update(positions)
            cause = "file" if positions and len(self.refused) < REFUSED else "disk"
        if cause == "disk":
            self.disk = reason
        return cause

    def lose(self, crew: Crew, why: str) -> None:
        """A crew is gone; `grow` makes another. FleetError if no actor can even be made, again and again."""
        self.unplaced += not crew.places
        if self.unplaced >= UNPLACED:
            raise FleetError(f"workers cannot be made: {why}; is dbtrain installed on every node?")
        self.drop(crew, "oom" if "OutOfMemory" in why or "memory" in why else "lost", why)
        self.grow()

    def drop(self, crew: Crew, cause: str, why: str) -> None:
        """Nothing; afterwards a crew is gone, with an entry about what it was at."""
        crew.kill(deaf=True)
        self.crews.pop(crew.name, None)
        with self.ledger.commit():
            self.ledger.drop_worker(crew.name)
            self.abandon(crew, cause, why)

    def abandon(self, crew: Crew, cause: str, reason: str) -> bool:
        """Whether a crew was at a unit, which came to an end before its time."""
        found = [number for number, flight in self.flights.items() if flight.crew is crew]
        for number in found:
            self.books.land(self.flights.pop(number), cause, reason)
        return bool(found)

    def wind_down(self) -> None:
        """Let trainers finish their step and checkpoint, as long as there is time; their subjects wait again."""
        for crew in self.crews.values():
            crew.ask_stop()
        end = time.monotonic() + self.options.grace_s
        while self.flights and time.monotonic() < end:
            self.listen(0.2)


HANDLERS = {
    "ready": Driver.on_ready,
    "finished": Driver.on_finished,
    "packed": Driver.on_packed,
    "failed": Driver.on_failed,
    "after": Driver.on_after,
    "done": Driver.on_done,
    "died": Driver.on_died,
}
"""What the driver does on each message of a worker."""


def pack_of(config: RunConfig) -> int:
    """Subjects that a worker trains together under a recipe."""
    if config.engine.kind != "packed":
        return 1
    packed = config.engine.packed
    return packed.largest if packed.size == "auto" else packed.size
