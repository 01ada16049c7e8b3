"""The books of a run under way: who waits, and what becomes of a subject when its attempt ends.

Every change goes to the ledger and to the schedule's view together. The driver, which knows crews and signals, opens
the commits around these calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dbtrain.fleet.ledger import Ledger
from dbtrain.fleet.schedule import BLAMED, Settings, View, WorkUnit, judge, stands_alone
from dbtrain.fleet.status import Screen

if TYPE_CHECKING:
    from dbtrain.fleet.crew import Crew


@dataclass
class Flight:
    """A unit that a crew is at: the attempts of its subjects that have not ended, in order; `pack` train at a time."""

    unit: WorkUnit
    crew: Crew
    open: dict[int, int]
    pack: int


class Books:
    """What is to be done, and the entries about what is over. asked: what is to be done with finished subjects, its
    settings by name (`afterwards.AFTER`)."""

    def __init__(self, ledger: Ledger, settings: Settings, asked: Mapping[str, str], screen: Screen):
        self.ledger, self.settings, self.asked, self.screen = ledger, settings, asked, screen
        self.view = read_view(ledger)
        self.todo: dict[int, list[str]] = {}
        """What is left to be done with finished subjects."""
        self.ends_after: dict[int, tuple[int, int]] = {}
        """Failures and losses of finished subjects that were being drawn or scored."""
        if asked:
            with ledger.commit():
                ledger.retry_after(asked)
        for position, noun, name in ledger.open_after(asked):
            self.todo.setdefault(position, []).append(name)
            if len(self.todo[position]) == 1:
                self.view.add_finished(noun, position)

    def finish(self, flight: Flight, position: int, result: dict[str, Any]) -> None:
        """A subject's files are published and verified: it is finished now, unless another attempt was before."""
        attempt = flight.open.pop(position)
        seconds = sum(result["stages_s"].values())
        if self.ledger.finish(position, attempt, {**result, "seconds": seconds}) and self.asked:
            self.todo[position] = list(self.asked)
            self.view.add_finished(flight.unit.class_noun, position)

    def retire(self, flight: Flight, position: int, cause: str | None, reason: str, seconds: float) -> None:
        """A subject's attempt is over without a result: it waits again, or is quarantined. No cause: never begun."""
        attempt = flight.open.pop(position)
        row = self.ledger.row(position)
        failures, losses, pack = row["failures"], row["losses"], row["pack"]
        if cause is None:
            state, alone, cause = "waiting", stands_alone(failures, losses), "unbegun"
        else:
            verdict = judge(cause, failures, losses, pack, flight.pack, self.settings)
            state, alone = verdict.state, verdict.alone
            failures, losses, pack = verdict.failures, verdict.losses, verdict.pack
        told = {"state": state, "failures": failures, "losses": losses, "pack": pack, "cause": cause, "reason": reason}
        self.ledger.fail(position, attempt, told, seconds)
        self.screen.note(row["id"], told)
        if state == "waiting":
            self.view.add(flight.unit.class_noun, position, alone, pack)

    def land(self, flight: Flight, cause: str, reason: str) -> None:
        """A unit is over: those of its subjects that were being worked on bear its end, the others wait again."""
        self.view.end(flight.unit, drawn=False)
        if flight.unit.kind == "prior":
            self._land_prior(flight, cause, reason)
        elif flight.unit.kind == "after":
            self._land_after(flight, cause, reason)
        else:
            suspects = list(flight.open)[: flight.pack]
            for position in list(flight.open):
                self.retire(flight, position, cause if position in suspects else None, reason, 0.0)

    def close(self, flight: Flight, seconds: float) -> None:
        """A unit is done. What its trainer told nothing of ends as with a crash."""
        if flight.open:
            self.land(flight, "crash", "its trainer told nothing of it")
        else:
            self.view.end(flight.unit)
        if flight.unit.kind != "train":
            self.ledger.note_spent(flight.unit.kind, flight.unit.class_noun, flight.crew.name, seconds, "done", "")

    def _land_prior(self, flight: Flight, cause: str, reason: str) -> None:
        """A part of a class's priors is drawn again; after too many failures its subjects are quarantined."""
        noun = flight.unit.class_noun
        self.ledger.note_spent("prior", noun, flight.crew.name, 0.0, cause, reason)
        priors = self.view.priors[noun]
        priors.failures += BLAMED[cause]
        if priors.failures >= self.settings.tries:
            ids = [row["id"] for row in self.ledger.rows("id, class", "state='waiting'") if row["class"] == noun]
            gone = self.ledger.settle(ids, ["waiting"], "quarantined", f"priors of {noun!r}: {reason}")
            self.view.remove({position for position, _ in gone})
            priors.todo.clear()

    def _land_after(self, flight: Flight, cause: str, reason: str) -> None:
        """The subject that was being drawn or scored is judged as in training; what is not given up waits again."""
        for position in list(flight.open)[:1]:
            verdict = judge(cause, *self.ends_after.pop(position, (0, 0)), None, 1, self.settings)
            if verdict.state == "quarantined":
                self.note_after(position, self.todo[position][0], reason)
            else:
                self.ends_after[position] = verdict.failures, verdict.losses
        for position in self.todo.keys() & flight.open.keys():
            self.view.add_finished(flight.unit.class_noun, position)
        flight.open.clear()

    def note_after(self, position: int, name: str, outcome: str) -> bool:
        """Whether nothing is left to be done with a finished subject, now that this was done or has failed."""
        self.ledger.note_after(position, name, self.asked[name], outcome)
        self.todo[position].remove(name)
        if not self.todo[position]:
            del self.todo[position]
        return position not in self.todo

    def obey(self, requests: Iterable[tuple[str, list[tuple[int, str]]]]) -> None:
        """Follow what another process asked for and the ledger knows already; running subjects run on."""
        for verb, changed in requests:
            if verb == "cancel":
                self.view.remove({position for position, _ in changed})
            else:
                for position, noun in changed:
                    self.view.add(noun, position)


def read_view(ledger: Ledger) -> View:
    """What a ledger says is to be trained."""
    view = View()
    for row in ledger.rows("position, class, failures, losses, pack", "state='waiting'"):
        view.add(row["class"], row["position"], stands_alone(row["failures"], row["losses"]), row["pack"])
    return view
