"""The books of a run under way: who waits, and what becomes of a subject when its attempt ends.

Every change goes to the ledger and to the schedule's view together. The driver, which knows crews and signals, opens
the commits around these calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dbtrain.fleet.causes import BLAMED, End, Verdict, stands_alone, verdict_on
from dbtrain.fleet.ledger import Ledger
from dbtrain.fleet.schedule import Limits, View, WorkUnit
from dbtrain.fleet.status import Screen

if TYPE_CHECKING:
    from dbtrain.fleet.crew import Crew


@dataclass
class Flight:
    """A unit that a crew works on. open: attempts of its subjects that have not ended, by position, in order; the first
    `unit.pack` of them train."""

    unit: WorkUnit
    crew: Crew
    open: dict[int, int]


class Books:
    """What is to be done, and the entries about what is over. asked: what is to be done with finished subjects
    (`work.AFTER`), with the settings that each result depends on."""

    def __init__(self, ledger: Ledger, limits: Limits, asked: Mapping[str, str], screen: Screen):
        self.ledger, self.limits, self.asked, self.screen = ledger, limits, asked, screen
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

    def finish(self, flight: Flight, position: int, result: Mapping[str, Any]) -> None:
        """Enter a subject as finished, whose files are published and verified, unless another attempt was earlier."""
        attempt = flight.open.pop(position)
        seconds = sum(result["stages_s"].values())
        if self.ledger.finish(position, attempt, {**result, "seconds": seconds}) and self.asked:
            self.todo[position] = list(self.asked)
            self.view.add_finished(flight.unit.class_noun, position)

    def retire(self, flight: Flight, position: int, end: End, seconds: float = 0.0, begun: bool = True) -> None:
        """Enter the end of a subject's attempt without a result: the subject waits again, or is quarantined. begun:
        whether the attempt was worked on; if not, it counts neither as a failure nor as a loss."""
        attempt = flight.open.pop(position)
        row = self.ledger.row(position)
        so_far = row["failures"], row["losses"], row["pack"]
        if begun:
            verdict = verdict_on(end.cause, *so_far, flight.unit.pack, self.limits)
        else:
            verdict = Verdict("waiting", *so_far)
        entry = {**asdict(verdict), "cause": end.cause if begun else "unbegun", "reason": end.reason}
        self.ledger.fail(position, attempt, entry, seconds)
        self.screen.note(row["id"], entry)
        if verdict.state == "waiting":
            alone = stands_alone(verdict.failures, verdict.losses)
            self.view.add(flight.unit.class_noun, position, alone, verdict.pack)

    def land(self, flight: Flight, end: End) -> None:
        """Enter the early end of a unit. Subjects in training get this cause; the rest of the unit waits again."""
        self.view.end(flight.unit, drawn=False)
        if flight.unit.kind == "prior":
            self._land_prior(flight, end)
        elif flight.unit.kind == "after":
            self._land_after(flight, end)
        else:
            for number, position in enumerate(list(flight.open)):
                self.retire(flight, position, end, begun=number < flight.unit.pack)

    def close(self, flight: Flight, seconds: float) -> None:
        """Enter the end of a unit that is done. Subjects without a message of their trainer end as with a crash."""
        if flight.open:
            self.land(flight, End("crash", "its trainer sent no message of it"))
        else:
            self.view.end(flight.unit)
        if flight.unit.kind != "train":
            self.ledger.note_spent(flight.unit.kind, flight.unit.class_noun, flight.crew.name, seconds, "done", "")

    def _land_prior(self, flight: Flight, end: End) -> None:
        """A part of a class's priors is drawn again; after too many failures its subjects are quarantined."""
        noun = flight.unit.class_noun
        self.ledger.note_spent("prior", noun, flight.crew.name, 0.0, end.cause, end.reason)
        priors = self.view.priors[noun]
        priors.failures += BLAMED[end.cause]
        if priors.failures >= self.limits.tries:
            self.view.remove(self.ledger.give_up_class(noun, f"priors of {noun!r}: {end.reason}"))
            priors.todo.clear()

    def _land_after(self, flight: Flight, end: End) -> None:
        """The first open subject was being drawn or scored, and gets a verdict as in training. All wait again, but for
        what is given up."""
        for position in list(flight.open)[:1]:
            verdict = verdict_on(end.cause, *self.ends_after.pop(position, (0, 0)), None, 1, self.limits)
            if verdict.state == "quarantined":
                self.note_after(position, self.todo[position][0], end.reason)
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
        """Follow requests of another process that the ledger holds already; running subjects run on."""
        for verb, changed in requests:
            if verb == "cancel":
                self.view.remove({position for position, _ in changed})
            else:
                for position, noun in changed:
                    self.view.add(noun, position)


def read_view(ledger: Ledger) -> View:
    """What a ledger says is to be trained."""
    view = View()
    for row in ledger.waiting():
        view.add(row["class"], row["position"], stands_alone(row["failures"], row["losses"]), row["pack"])
    return view
