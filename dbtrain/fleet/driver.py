"""The driver: gives waiting subjects to idle workers and enters what becomes of them, until nothing is left to do.

While a driver is alive, only it writes the ledger. An order and a result are in the ledger before anything follows from
them, so the driver may be killed at any moment: the same command goes on. One loop, no threads: schedule -> wait for
messages -> one commit -> again.
"""

from __future__ import annotations

import math
import signal
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import ray

from dbtrain.data.index import Index
from dbtrain.engines.kind import resolved_engine
from dbtrain.errors import FleetError, StopRequested, reached
from dbtrain.fleet.arrivals import LOOK_S, Arrivals
from dbtrain.fleet.books import Books, Flight
from dbtrain.fleet.causes import End
from dbtrain.fleet.cluster import has_gpus, room
from dbtrain.fleet.crew import Crew, Lost, Shape
from dbtrain.fleet.forgetting import end_forgetting, told
from dbtrain.fleet.gauges import Gauges
from dbtrain.fleet.inbox import take_requests
from dbtrain.fleet.lease import find_ledger
from dbtrain.fleet.ledger import Ledger
from dbtrain.fleet.messages import Died, Failed, Finished, FollowedUp, Measure, Message, Order, Ready, Task, UnitDone
from dbtrain.fleet.options import Options
from dbtrain.fleet.run_folder import mark
from dbtrain.fleet.schedule import Idle, Limits, schedule
from dbtrain.fleet.status import Screen, summarize
from dbtrain.fleet.warm_parent import new_name
from dbtrain.machine import take_signals
from dbtrain.priors import BLOCK
from dbtrain.results.checkpoint import newest_step
from dbtrain.results.uploading import Uploads
from dbtrain.settings.config import RunConfig
from dbtrain.subjects.forgotten import read_pending

TICK_S = 1.0
GROW_S = 5.0
"""Seconds between heartbeats, and between looks at what the cluster holds."""
UNPLACED = 10
"""Actors that may die before they answer once, with no trainer that loaded the base in between."""
BAD_STARTS = 3
"""Trainers of one crew that may fail to load the base, one after another."""
REFUSED = 5
"""Subjects in a row, with none finished in between, whose files are refused: then it is the disk and not theirs."""
NO_START = ("killed", "stopped", "disk", "unmounted")
"""Ends of a trainer that say nothing of the next start, or end the run anyway."""


class Driver:
    """One run under way."""

    def __init__(
        self, ledger: Ledger, index: Index, config: RunConfig, out: Path, options: Options, host: str | None = None
    ):
        self.ledger, self.index, self.config, self.out, self.options = ledger, index, config, out.resolve(), options
        self.token = mark(self.out)
        self.screen, self.gauges = Screen(out, options.quiet), Gauges()
        self.uploads = Uploads(config.publish.to, (lambda line: None) if options.quiet else self.screen.say)
        self.pack = rows_of_packs(config, options, ledger)
        """Rows of a pack; None until a trainer has measured it."""
        self.books = Books(ledger, limits_of(config, options, self.pack or 1), options.asked, self.screen)
        self.shape = Shape(options.gang, 0, options.cpus, options.hang_s, host or new_name())
        self.crews: dict[str, Crew] = {}
        self.flights: dict[int, Flight] = {}
        self.names, self.numbers = count(1), count(1)
        self.cramped = False
        self.stopping: str | None = None
        self.interrupted: dict[str, int] = {}
        """Steps in the checkpoints of the subjects that a stop interrupted, by id."""
        self.disk: str | None = None
        """The disk error that ends the run; None while writes succeed."""
        self.refused: set[int] = set()
        self.unplaced = 0
        self.arrivals: Arrivals | None = None
        """Where subjects join from while the run goes on; None where the run ends with its last subject."""

    def drive(self) -> None:
        """Work until nothing waits, or a stop is asked for."""
        take_signals((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), self.ask_stop)
        slow = fast = looked = 0.0
        ended = "failed"
        try:
            while self.arrivals or self.flights or not (self.books.view.empty or self.stopping or self.disk):
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
                if self.arrivals and now - looked > LOOK_S:
                    looked = now
                    self.index, joined = self.arrivals.take(self.ledger, self.index)
                    for noun, position in joined:
                        self.books.view.add(noun, position)
                self.assign()
                self.listen(0.2)
            ended = "stopped" if self.stopping or self.disk else "done"
        finally:
            self.conclude(ended)
        if self.disk:
            raise FleetError(f"{self.out}: {self.disk}")
        if self.stopping:
            left, steps = self.ledger.counts()["waiting"], reached(self.interrupted)
            raise StopRequested(
                f"stopped on request ({self.stopping}), {left} subjects wait{steps}{self.uploads.left}; the "
                "same command goes on"
            )

    def ask_stop(self, number: int, _: object = None) -> None:
        """Stop because of a signal. Raises KeyboardInterrupt for a Ctrl-C after an earlier request."""
        if number == signal.SIGINT and self.stopping:
            raise KeyboardInterrupt
        self.stopping = signal.Signals(number).name

    def conclude(self, ended: str) -> None:
        """End all crews, and leave the ledger and the terminal as they should be."""
        for crew in self.crews.values():
            crew.kill()
        # What ended the run may be a ledger that takes no more; its error is under way already.
        with suppress(FleetError) if ended == "failed" else nullcontext(), self.ledger.commit():
            self.ledger.take_over()
            self.ledger.beat(ended)
        self.screen.close(summarize(self.ledger))

    def grow(self) -> None:
        """Make as many crews as were asked for or as the cluster has room for; with GPUs, as soon as there are any."""
        if not self.shape.gpus and has_gpus():
            self.shape = replace(self.shape, gpus=self.options.gpus)
            for crew in list(self.crews.values()):
                self.drop(crew, End("lost", "GPUs have joined, which take its place"))
        members = room(self.shape.gpus, self.shape.cpus)
        self.warn_of_room(members)
        room_for = max(1, members // self.shape.size)
        left_out = sum(crew.state == "left out" for crew in self.crews.values())
        asked = self.options.workers
        wanted = min(asked + left_out, max(room_for, asked)) if asked else room_for
        while len(self.crews) < wanted:
            name = f"worker-{next(self.names):03d}"
            measure = None
            if self.pack is None and not any(crew.task.measure for crew in self.crews.values()):
                largest, rank = self.ledger.widest()
                measure = Measure(rank, math.ceil(largest / wanted))
            task = Task(self.config.model_dump(mode="json"), str(self.out), dict(self.options.evaluation),
                        token=self.token, measure=measure)  # fmt: skip
            self.crews[name] = Crew(name, self.shape, task)

    def warn_of_room(self, members: int) -> None:
        """Say once that there is no room for a worker, and again if there was room in between."""
        if (members < self.shape.size) != self.cramped:
            self.cramped = not self.cramped
            each = f"{self.shape.cpus:g} CPUs" + (f" and {self.shape.gpus:g} GPUs" if self.shape.gpus else "")
            if self.cramped:
                self.screen.say(
                    f"waiting for machines: want room for {self.shape.size} workers of {each} each, the cluster has it "
                    f"for {members}; let machines join, or lower --cpus or --gang"
                )

    def tick(self) -> None:
        """Enter a heartbeat, follow requests, replace workers that do not answer, and show where the run stands."""
        for crew in [crew for crew in self.crews.values() if crew.overdue()]:
            self.lose(crew, f"did not answer for {self.options.hang_s:g} s")
        self.books.obey(take_requests(self.ledger, find_ledger(self.out)))
        if read_pending(self.out):
            self.forget()
        with self.ledger.commit():
            self.ledger.beat("running")
            for crew in self.crews.values():
                self.ledger.note_worker(crew.row())
            summary = summarize(self.ledger)
        self.screen.show(summary)
        self.gauges.show(summary)

    def forget(self) -> None:
        """Forget the subjects that are asked for. Trainers checkpoint and end before, because their orders name places
        in shards that are written anew; then new workers go on from the ledger."""
        self.screen.say("forgetting subjects on request; workers checkpoint, and go on afterwards")
        self.wind_down()
        self.interrupted.clear()
        self.uploads.leave(read_pending(self.out))
        for crew in list(self.crews.values()):
            self.drop(crew, End("stopped", "subjects are being forgotten"))
        done, priors = end_forgetting(self.out, self.ledger), self.books.view.priors
        self.screen.say("\n".join(told(self.out, done)))
        if self.config.data.shards is None:
            self.index = Index.load(self.out / "shards")
        self.books = Books(self.ledger, self.books.limits, self.options.asked, self.screen)
        self.books.view.priors = priors
        self.grow()

    def assign(self) -> None:
        """Give every idle crew a unit, if there is one, after the ledger holds it; none before packs have a size."""
        idle = [crew for crew in self.crews.values() if crew.state == "idle"]
        if not idle or self.pack is None:
            return
        alive = sum(crew.state not in ("placing", "left out") for crew in self.crews.values())
        orders, waiting = [], [Idle(crew.name, crew.last_class) for crew in idle]
        units = schedule(self.books.view, waiting, alive, self.books.limits)
        with self.ledger.commit():
            for name, unit in units:
                number, crew = next(self.numbers), self.crews[name]
                attempts = self.ledger.start(number, unit.positions, name) if unit.kind == "train" else {}
                self.flights[number] = Flight(unit, crew, attempts or dict.fromkeys(unit.positions, 0))
                subjects = self.ledger.subjects(unit.positions)
                rows = tuple(row for subject in subjects for row in self.index.entries_of(subject.id))
                after = tuple(tuple(self.books.todo.get(position, ())) for position in unit.positions)
                orders.append((crew, Order(number, unit, subjects, rows, after)))
        for crew, order in orders:
            crew.give(order)

    def listen(self, wait_s: float) -> None:
        """Enter all messages that there are, in one commit."""
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
                    for message in crew.accept(call) if call in crew.pending else []:
                        self.enter(crew, message)
                except Lost as error:
                    lost.append((crew, str(error)))
        for crew, why in lost:
            self.lose(crew, why)

    def enter(self, crew: Crew, message: Message) -> None:
        """Enter what a message says."""
        match message:
            case Ready():
                self.on_ready(crew, message)
            case Finished(number, position, result):
                self.refused.clear()
                self.books.finish(self.flights[number], position, result)
                self.uploads.add([self.out / "subjects" / self.ledger.row(position)["id"]])
            case Failed(number, position, end, seconds):
                self.books.retire(self.flights[number], position, self.sift(end, [position]), seconds)
                self.heed(crew, end)
            case FollowedUp(number, position, name, outcome):
                if self.books.note_after(position, name, outcome):
                    self.flights[number].open.pop(position)
            case UnitDone(number, seconds):
                crew.unit = None
                self.books.close(self.flights.pop(number), seconds * self.shape.size)
            case Died(end):
                self.on_died(crew, end)

    def on_ready(self, crew: Crew, ready: Ready) -> None:
        """Note that a trainer has loaded the base, and the size of a pack if the trainer has measured that."""
        crew.bad_starts = self.unplaced = 0
        if not self.ledger.same_base(ready.base):
            raise FleetError(
                f"{self.out}: holds a run of another base than {self.config.model.path}; use another --out"
            )
        if ready.pack is not None:
            self.pack = ready.pack
            self.ledger.note_pack(ready.pack)
            self.books.limits = limits_of(self.config, self.options, ready.pack)
            crew.task = replace(crew.task, measure=None)

    def on_died(self, crew: Crew, end: End) -> None:
        """Enter the death of a crew's trainer; the crew has begun to start another."""
        at_work = [position for flight in self.flights.values() if flight.crew is crew for position in flight.open]
        end = self.sift(end, at_work[:1])
        started = self.abandon(crew, end)
        self.heed(crew, end)
        if not started and end.cause not in NO_START:
            crew.bad_starts += 1
            if crew.bad_starts >= BAD_STARTS and not self.leave_out(crew, end):
                raise FleetError(f"{crew.name}: its trainer cannot start: {end.reason}; see {self.out / 'logs'}")

    def heed(self, crew: Crew, end: End) -> None:
        """Leave out a crew on whose machine the run's folder is not there; the last one's want of it ends the run."""
        if end.cause == "unmounted":
            self.abandon(crew, end)
            if not self.leave_out(crew, end):
                self.disk = end.reason

    def leave_out(self, crew: Crew, end: End) -> bool:
        """Whether the run goes on without a crew whose machine or GPU cannot work, as there are others that may."""
        if all(other.state == "left out" for other in self.crews.values() if other is not crew):
            return False
        crew.leave_out()
        self.screen.say(f"{crew.name}: is left out, and the others go on: {end.reason}; see {self.out / 'logs'}")
        return True

    def sift(self, end: End, positions: list[int]) -> End:
        """The end, with `disk` as its cause where a refused file is no subject's own, or the latest of too many; `disk`
        ends the run. positions: of the subject that was at work, if one was."""
        if end.cause == "file":
            self.refused.update(positions)
            end = end if positions and len(self.refused) < REFUSED else replace(end, cause="disk")
        if end.cause == "disk":
            self.disk = end.reason
        return end

    def lose(self, crew: Crew, why: str) -> None:
        """Replace a crew that is gone. FleetError if no actor can even be made, again and again."""
        self.unplaced += not crew.places
        if self.unplaced >= UNPLACED:
            raise FleetError(f"workers cannot be made: {why}; is dbtrain installed on every node?")
        self.drop(crew, End("oom" if "OutOfMemory" in why or "memory" in why else "lost", why))
        self.grow()

    def drop(self, crew: Crew, end: End) -> None:
        """Kill a crew, and enter the end of what it was at."""
        crew.kill(stopped=True)
        self.crews.pop(crew.name, None)
        with self.ledger.commit():
            self.ledger.drop_worker(crew.name)
            self.abandon(crew, end)

    def abandon(self, crew: Crew, end: End) -> bool:
        """Whether a crew was at a unit, whose early end is entered now."""
        numbers = [number for number, flight in self.flights.items() if flight.crew is crew]
        for number in numbers:
            self.books.land(self.flights.pop(number), end)
        return bool(numbers)

    def wind_down(self) -> None:
        """Let trainers finish their step and checkpoint, as long as there is time; their subjects wait again."""
        at_work = [position for flight in self.flights.values() if flight.unit.kind == "train"
                   for position in flight.open]  # fmt: skip
        for crew in self.crews.values():
            crew.ask_stop()
        end = time.monotonic() + self.options.grace_s
        while self.flights and time.monotonic() < end:
            self.listen(0.2)
        for position in at_work:
            row = self.ledger.row(position)
            step = newest_step(self.out / "subjects" / row["id"] / "checkpoints")
            if row["state"] != "finished" and step:
                self.interrupted[row["id"]] = step


def rows_of_packs(config: RunConfig, options: Options, ledger: Ledger) -> int | None:
    """Subjects that a worker trains together; None where this is to be measured and was not yet."""
    config = resolved_engine(config, options.gang, "cpu")[0]  # a pack of one, which a GPU may choose, has one row too
    if config.engine.kind != "packed" or options.gang > 1:
        return 1
    size = config.engine.packed.size
    return ledger.pack() if size == "auto" else size


def limits_of(config: RunConfig, options: Options, pack: int) -> Limits:
    """What the schedule may use, for packs of so many rows. A gang draws all of a class's priors together."""
    blocks = math.ceil(config.prior.images / BLOCK) if config.prior.weight > 0 else 0
    parts = min(blocks, 1) if options.gang > 1 else blocks
    unit = 1 if options.watch else options.unit  # so that nobody who joins waits for a long unit to end
    return Limits(pack, unit * pack, tries=options.tries, losses=options.losses, newest=options.watch,
                  prior_parts=parts)  # fmt: skip
