"""The driver's end of a worker: one Ray actor, or a gang of them that trains as one. Nothing here waits.

A crew is a small state machine fed with finished Ray calls:

    from                    to        when
    (new)                   placing   actors are being made
    placing                 starting  every actor has said where it is; trainers load the base
    starting                idle      every trainer has sent `Ready`
    idle                    busy      the driver gives an order
    busy                    idle      every trainer has sent `UnitDone`
    starting, idle, busy    dying     one trainer has died
    any                     left out  its machine cannot work; its actors stay, so that no other takes their places
    dying                   starting  it is known why, or DYING_S have passed; new trainers of the next generation

A crew that loses an actor is lost in any state, and the driver makes another. Ray's own restarts and retries are off:
only the ledger decides what is tried again.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from dbtrain.errors import first_line
from dbtrain.fleet.causes import End, end_of_gang
from dbtrain.fleet.messages import Died, Message, Order, Ready, Task, UnitDone
from dbtrain.fleet.processes import born, kill
from dbtrain.fleet.schedule import WorkUnit
from dbtrain.fleet.worker import Worker

POLL_S = 1.0
"""Seconds that a worker waits for messages before it answers that there are none."""
DYING_S = 5.0
"""Seconds for all members of a gang to say why they ended: the error of one may follow from another's end."""


@dataclass(frozen=True)
class Shape:
    """What every crew is made of: `size` actors with these resources each."""

    size: int
    gpus: float
    cpus: float
    hang_s: float
    host: str = ""
    """Name of a machine's warm parent."""


class Actor(Worker):
    """A worker as a Ray actor."""

    def describe(self) -> dict[str, Any]:
        """Where in the cluster this worker is."""
        node, pid = ray.get_runtime_context().get_node_id(), os.getpid()
        here = {"host": socket.gethostname(), "ip": ray.util.get_node_ip_address()}
        return {**here, "node": node, "pid": pid, "born": born(pid)}


class Lost(Exception):
    """An actor of the crew is gone; the message says what Ray knows."""


class Crew:
    """One worker of the schedule."""

    def __init__(self, name: str, shape: Shape, task: Task):
        self.name, self.shape, self.task = name, shape, task
        self.state, self.generation, self.restarts, self.bad_starts = "placing", 0, 0, 0
        self.last_class: str | None = None
        self.unit: WorkUnit | None = None
        self.number = 0
        self.pending: dict[Any, tuple[Callable, int, float]] = {}
        self.places: dict[int, dict[str, Any]] = {}
        self.waiting_for: set[int] = set()
        self.ends: dict[int, End] = {}
        self.dying = 0.0
        self.group: PlacementGroup | None = None
        if shape.size > 1:
            bundle = {"CPU": shape.cpus, **({"GPU": shape.gpus} if shape.gpus else {})}
            self.group = placement_group([bundle] * shape.size)
        self.members = [self._member(rank) for rank in range(shape.size)]
        for rank, member in enumerate(self.members):
            self._call(member.describe, rank, self._placed)

    def _member(self, rank: int) -> Any:
        place: Any = None if self.group is None else PlacementGroupSchedulingStrategy(self.group, rank)
        maker = ray.remote(Actor).options(
            num_cpus=self.shape.cpus, num_gpus=self.shape.gpus, max_restarts=0, max_task_retries=0, max_concurrency=4,
            scheduling_strategy=place,
        )  # fmt: skip
        name = self.name if self.group is None else f"{self.name}-{rank}"
        return maker.remote(name, self.task.out, self.shape.hang_s, self.shape.host)

    def _call(self, method: Any, rank: int, then: Callable, *arguments: Any) -> None:
        self.pending[method.remote(*arguments)] = (then, rank, time.monotonic())

    def accept(self, call: Any) -> list[Message]:
        """The messages of the workers that a finished call brings. Raises Lost when the actor is gone."""
        then, rank, _ = self.pending.pop(call)
        try:
            value = ray.get(call)
        except ray.exceptions.RayError as error:
            raise Lost(first_line(error)) from error
        return then(rank, value) or []

    def overdue(self) -> bool:
        """Whether an actor has not answered for longer than it may; Ray itself would wait for ever."""
        limit = time.monotonic() - POLL_S - self.shape.hang_s
        return any(then == self._heard and since < limit for then, _, since in self.pending.values())

    def _placed(self, rank: int, place: dict[str, Any]) -> None:
        self.places[rank] = place
        if len(self.places) == len(self.members):
            self._start()
            for member_rank, member in enumerate(self.members):
                self._call(member.poll, member_rank, self._heard, POLL_S)

    def _start(self) -> None:
        """Start fresh trainers. A gang needs a port of its first member before."""
        self.state, self.unit, self.waiting_for = "starting", None, set(range(len(self.members)))
        self.ends = {}
        self.generation += 1
        if len(self.members) == 1:
            self._call(self.members[0].start, 0, lambda *_: None, self.task, self.generation)
        else:
            for rank, member in enumerate(self.members):
                self._call(member.halt, rank, self._halted, self.generation)

    def _halted(self, rank: int, _: Any) -> None:
        if rank == 0:
            self._call(self.members[0].free_port, 0, self._meet)

    def _meet(self, _: int, port: int) -> None:
        for rank, member in enumerate(self.members):
            environment = {"RANK": str(rank), "WORLD_SIZE": str(len(self.members)), "LOCAL_RANK": "0",
                           "MASTER_ADDR": self.places[0]["ip"], "MASTER_PORT": str(port)}  # fmt: skip
            task = replace(self.task, environment=environment)
            self._call(member.start, rank, lambda *_: None, task, self.generation)

    def _heard(self, rank: int, answer: tuple[int, list[Message]]) -> list[Message]:
        generation, messages = answer
        self._call(self.members[rank].poll, rank, self._heard, POLL_S)
        heard: list[Message] = []
        for message in messages if generation == self.generation else []:
            if isinstance(message, Died):
                self.dying = self.dying if self.ends else time.monotonic()
                self.state, self.ends[rank] = "dying", message.end
                break
            if isinstance(message, Ready | UnitDone):
                self.waiting_for.discard(rank)
                if self.waiting_for:
                    continue
                self.state = "dying" if self.ends else "idle"
            heard.append(message)
        return heard + self._bury()

    def _bury(self) -> list[Message]:
        """Report the trainers' death and restart them, once the cause is known or `DYING_S` have passed."""
        late = bool(self.ends) and time.monotonic() - self.dying > DYING_S
        end = end_of_gang(self.ends, len(self.ends) if late else len(self.members))
        if end is None:
            return []
        self.restarts += 1
        self._start()
        return [Died(end)]

    def give(self, order: Order) -> None:
        """Hand a unit to every member."""
        self.state, self.unit, self.number = "busy", order.unit, order.number
        packed = pickle.dumps(order)
        self.last_class, self.waiting_for = order.unit.class_noun, set(range(len(self.members)))
        for rank, member in enumerate(self.members):
            self._call(member.give, rank, lambda *_: None, packed, self.generation)

    def ask_stop(self) -> None:
        """Ask the trainers to finish their step, checkpoint and leave."""
        for rank, member in enumerate(self.members):
            self._call(member.ask_stop, rank, lambda *_: None)

    def leave_out(self) -> None:
        """End its trainers, and start none again."""
        self.state, self.unit = "left out", None
        self.generation += 1  # what its trainers still say does not count
        for rank, member in enumerate(self.members):
            self._call(member.halt, rank, lambda *_: None, self.generation)

    def kill(self, stopped: bool = False) -> None:
        """Kill every process of the crew, and let none begin. stopped: its actors may be stopped and not obey Ray."""
        for rank, member in enumerate(self.members):
            ray.kill(member)
            if stopped and rank in self.places:
                strike(self.places[rank])
        if self.group is not None:
            remove_placement_group(self.group)
        self.pending.clear()

    def row(self) -> dict[str, Any]:
        """The crew as the ledger keeps it."""
        place = self.places.get(0, {})
        return {"name": self.name, "node": place.get("node"), "host": place.get("host"), "pid": place.get("pid"),
                "state": self.state, "unit": self.number if self.unit else None, "restarts": self.restarts}  # fmt: skip


def strike(place: dict[str, Any]) -> None:
    """Kill a worker's process on its own machine, also when the process is stopped."""
    if place["host"] == socket.gethostname():
        kill_same(place["pid"], place["born"])
        return
    on_node = NodeAffinitySchedulingStrategy(place["node"], soft=False)
    task = ray.remote(kill_same).options(num_cpus=0, max_retries=0, scheduling_strategy=on_node)
    task.remote(place["pid"], place["born"])


def kill_same(pid: int, birth: str) -> None:
    """Kill a process, if it is still the one that was born then (`processes.born`)."""
    if born(pid) == birth:
        kill(pid)
