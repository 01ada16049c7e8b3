"""The driver: gives waiting subjects to idle workers and enters what becomes of them, until nothing is left to do.

It alone writes the ledger. Everything it must not lose is there before the next thing happens, so it may be killed at
any moment: the same command goes on. One loop, no threads: schedule -> wait for news -> one commit -> again.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from dbtrain.config import RunConfig
from dbtrain.data.index import Index
from dbtrain.errors import FleetError, StopRequested
from dbtrain.fleet.cluster import crews_possible
from dbtrain.fleet.crew import Crew, Lost, Shape
from dbtrain.fleet.gauges import Gauges
from dbtrain.fleet.ledger import Ledger, find_ledger
from dbtrain.fleet.requests import apply, requests_in
from dbtrain.fleet.run import Options
from dbtrain.fleet.schedule import CAUSES, Idle, Settings, View, WorkUnit, judge, schedule
from dbtrain.fleet.status import Screen, summarize
from dbtrain.fleet.trainer import Message, Order, Task
from dbtrain.priors import BLOCK

TICK_S = 1.0
GROW_S = 5.0
"""Seconds between heartbeats, and between looks at what the cluster holds."""
UNPLACED = 10
"""Actors that may die before they answer once, with none that ever worked in between."""
BAD_STARTS = 3
"""Trainers of one crew that may fail to load the base, one after another."""


@dataclass
class Flight:
    """A unit that a crew is at: the attempts of its subjects that have not ended, in order."""

    unit: WorkUnit
    crew: Crew
    open: dict[int, int] = field(default_factory=dict)


class Driver:
    """One run under way."""

    def __init__(self, ledger: Ledger, index: Index, config: RunConfig, out: Path, options: Options):
        self.ledger, self.index, self.config, self.out, self.options = ledger, index, config, out.resolve(), options
        self.pack = pack_of(config) if options.gang == 1 else 1
        blocks = -(-config.prior.images // BLOCK) if config.prior.weight > 0 else 0
        self.settings = Settings(self.pack, options.unit * self.pack, tries=options.tries, losses=options.losses,
                                 prior_parts=min(blocks, 1) if options.gang > 1 else blocks)  # fmt: skip
        self.view = read_view(ledger, bool(options.after))
        self.crews: dict[str, Crew] = {}
        self.flights: dict[int, Flight] = {}
        self.bad_starts: dict[str, int] = {}
        self.made = self.units = 0
        self.wanted = 0
        self.stopping: str | None = None
        self.disk: str | None = None
        self.unplaced = 0
        self.screen, self.gauges = Screen(out, options.quiet), Gauges()

    def drive(self) -> None:
        """Work until nothing waits, or a stop is asked for."""
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(name, lambda number, _: setattr(self, "stopping", signal.Signals(number).name))
        gpus = self.options.gpus if ray.cluster_resources().get("GPU") else 0
        self.shape = Shape(self.options.gang, gpus, self.options.cpus, self.options.hang_s)
        slow = fast = 0.0
        try:
            while self.flights or not (self.view.empty or self.stopping or self.disk):
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
        finally:
            for crew in self.crews.values():
                crew.kill()
            self.screen.close(summarize(self.ledger))
        self.conclude()

    def conclude(self) -> None:
        """Say why the run ended early, if it did."""
        with self.ledger.commit():
            self.ledger.take_over()
            self.ledger.beat("stopped" if self.stopping or self.disk else "done")
        if self.disk:
            raise FleetError(f"{self.out}: {self.disk}; free disk space, then run the same command to go on")
        if self.stopping:
            left = self.ledger.counts()["waiting"]
            raise StopRequested(f"stopped on request ({self.stopping}), {left} subjects wait; the same command goes on")

    def grow(self) -> None:
        """As many crews as were asked for or as the cluster has room for."""
        possible = max(1, crews_possible(self.shape.gpus, self.shape.cpus, self.shape.size))
        self.wanted = self.options.workers or possible
        while len(self.crews) < self.wanted:
            self.made += 1
            name = f"worker-{self.made:03d}"
            after = self.options.after
            task = Task(self.config.model_dump(mode="json"), str(self.out), self.pack, after)
            self.crews[name] = Crew(name, self.shape, task)

    def tick(self) -> None:
        """Heartbeat, requests from other terminals, workers that do not answer, what is shown."""
        for crew in [crew for crew in self.crews.values() if crew.overdue()]:
            self.lose(crew, f"did not answer for {self.options.hang_s:g} s")
        asked = requests_in(find_ledger(self.out))
        with self.ledger.commit():
            self.ledger.beat("running")
            for _, request in asked:
                self.obey(request)
            for crew in self.crews.values():
                self.ledger.note_worker(crew.row())
            summary = summarize(self.ledger)
        for path, _ in asked:
            path.unlink()
        self.screen.show(summary)
        self.gauges.show(summary)

    def obey(self, request: dict[str, Any]) -> None:
        """Apply what another process asked for; running subjects run on."""
        changed = apply(self.ledger, request)
        if request["verb"] == "cancel":
            self.view.remove({position for position, _ in changed})
        else:
            for position, noun in changed:
                self.view.add(noun, position, alone=True)

    def assign(self) -> None:
        """Give every idle crew a unit, if there is one; the ledger knows it first."""
        idle = [crew for crew in self.crews.values() if crew.state == "idle"]
        if not idle:
            return
        alive = sum(crew.state in ("idle", "busy", "starting") for crew in self.crews.values())
        given = schedule(self.view, [Idle(crew.name, crew.last_class) for crew in idle], alive, self.settings)
        orders = []
        with self.ledger.commit():
            for name, unit in given:
                self.units += 1
                number, crew = self.units, self.crews[name]
                opened = self.ledger.start(number, unit.positions, name) if unit.kind == "train" else {}
                opened = opened or dict.fromkeys(unit.positions, 0)
                self.flights[number] = Flight(unit, crew, opened)
                specs = tuple(self.ledger.specs(unit.positions))
                rows = tuple(row for spec in specs for row in self.index.rows_of(spec["id"]))
                orders.append((crew, Order(number, unit, specs, rows)))
                self.view.begin(unit)
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
        """A subject's files are published and verified: it is finished now, unless another attempt was before."""
        _, number, position, result = event
        attempt = self.flights[number].open.pop(position)
        seconds = sum(result["stages_s"].values())
        if self.ledger.finish(position, attempt, {**result, "seconds": seconds}):
            if self.options.after:
                self.view.after.setdefault(self.flights[number].unit.class_noun, deque()).append(position)

    def on_failed(self, crew: Crew, event: Message) -> None:
        """A subject failed by itself and its trainer goes on."""
        _, number, position, cause, reason, seconds = event
        self.retire(self.flights[number], position, cause, reason, seconds)

    def on_after(self, crew: Crew, event: Message) -> None:
        """A finished subject is drawn and scored, or could not be."""
        _, number, position, outcome = event
        self.flights[number].open.pop(position, None)
        self.ledger.note_after(position, outcome)

    def on_done(self, crew: Crew, event: Message) -> None:
        """A unit is over."""
        _, number, seconds = event
        flight = self.flights.pop(number)
        crew.unit = None
        self.land(flight, "crash", "its trainer told nothing of it")
        if flight.unit.kind != "train":
            cost = seconds * self.shape.size
            self.ledger.note_spent(flight.unit.kind, flight.unit.class_noun, crew.name, cost, "done", "")
        self.view.end(flight.unit)

    def on_died(self, crew: Crew, event: Message) -> None:
        """A crew's trainer is dead; the crew has begun to start another."""
        _, cause, reason = event
        if cause == "disk":
            self.disk = reason
        flight = next((one for one in self.flights.values() if one.crew is crew), None)
        if flight is not None:
            self.abandon(flight, cause, reason)
            return
        if cause not in ("killed", "stopped"):
            self.bad_starts[crew.name] = self.bad_starts.get(crew.name, 0) + 1
            if self.bad_starts[crew.name] >= BAD_STARTS:
                raise FleetError(f"{crew.name}: its trainer cannot start: {reason}; see {self.out / 'logs'}")

    def lose(self, crew: Crew, why: str) -> None:
        """A crew is gone; `grow` makes another. FleetError if no actor can even be made, again and again."""
        self.unplaced += not crew.places
        if self.unplaced >= UNPLACED:
            raise FleetError(f"workers cannot be made: {why}; is dbtrain installed on every node?")
        crew.kill(deaf=True)
        self.crews.pop(crew.name, None)
        cause = "oom" if "OutOfMemory" in why or "memory" in why else "lost"
        with self.ledger.commit():
            self.ledger.drop_worker(crew.name)
            for flight in [one for one in self.flights.values() if one.crew is crew]:
                self.abandon(flight, cause, why)
        self.grow()

    def abandon(self, flight: Flight, cause: str, reason: str) -> None:
        """A unit came to an end before its time."""
        number = next(key for key, one in self.flights.items() if one is flight)
        del self.flights[number]
        if flight.unit.kind == "prior":
            self.abandon_prior(flight, cause, reason)
            return
        self.land(flight, cause, reason)
        self.view.end(flight.unit)

    def abandon_prior(self, flight: Flight, cause: str, reason: str) -> None:
        """A part of a class's priors is drawn again; after too many failures its subjects are quarantined."""
        noun = flight.unit.class_noun
        self.ledger.note_spent("prior", noun, flight.crew.name, 0.0, cause, reason)
        self.view.end(flight.unit, drawn=False)
        priors = self.view.priors[noun]
        priors.failures += CAUSES[cause].blame
        if priors.failures >= self.settings.tries:
            ids = [row["id"] for row in self.ledger.rows("id, class", "state='waiting'") if row["class"] == noun]
            gone = self.ledger.settle(ids, ["waiting"], "quarantined", f"priors of {noun!r}: {reason}")
            self.view.remove({position for position, _ in gone})
            priors.todo.clear()

    def land(self, flight: Flight, cause: str, reason: str) -> None:
        """The subjects of a unit that have not ended: those that were being trained bear its end, the others wait."""
        suspects = list(flight.open)[: min(self.pack, flight.unit.pack)]
        for position in list(flight.open):
            if flight.unit.kind == "after":
                self.ledger.note_after(position, reason)
            else:
                self.retire(flight, position, cause if position in suspects else None, reason, 0.0)
        flight.open.clear()

    def retire(self, flight: Flight, position: int, cause: str | None, reason: str, seconds: float) -> None:
        """A subject's attempt is over without a result: it waits again, or is quarantined. No cause: never begun."""
        attempt = flight.open.pop(position)
        row = self.ledger.row(position)
        failures, losses, pack = row["failures"], row["losses"], row["pack"]
        if cause is None:
            state, alone, cause = "waiting", failures > 0, "unbegun"
        else:
            verdict = judge(cause, failures, losses, pack, flight.unit.pack, self.settings)
            state, alone = verdict.state, verdict.alone
            failures, losses, pack = verdict.failures, verdict.losses, verdict.pack
        told = {"state": state, "failures": failures, "losses": losses, "pack": pack, "cause": cause, "reason": reason}
        self.ledger.fail(position, attempt, told, seconds)
        self.screen.note(row["id"], told)
        if state == "waiting":
            self.view.add(flight.unit.class_noun, position, alone, pack)

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


def read_view(ledger: Ledger, after: bool) -> View:
    """What a ledger says is to be done."""
    view = View()
    for row in ledger.rows("position, class, failures, losses, pack", "state='waiting'"):
        view.add(row["class"], row["position"], row["failures"] > 0, row["pack"])
    for row in ledger.rows("position, class", "state='finished' AND after IS NULL") if after else ():
        view.after.setdefault(row["class"], deque()).append(row["position"])
    return view
