"""The books by themselves, with a real ledger: who waits after an attempt's end, and for what."""

from types import SimpleNamespace

import pytest

from dbtrain.fleet.books import Books, Flight
from dbtrain.fleet.causes import End
from dbtrain.fleet.schedule import Limits, WorkUnit
from dbtrain.fleet.status import Screen
from tests.kit.fleet_run import run_of_dogs

RESULT = {"run": "r", "files": {}, "gpu_seconds": 1.0, "stages_s": {"train": 1.0}}
ASKED = {"generate": "", "evaluate": "quick"}
KILLED, CRASH = End("killed", "died of SIGKILL"), End("crash", "died of SIGABRT")


@pytest.fixture
def books(tmp_path):
    with run_of_dogs(tmp_path, 6) as ledger:
        yield Books(ledger, Limits(tries=3, prior_parts=1), ASKED, Screen(tmp_path, quiet=True))


def fly(books, unit):
    """A unit under way at a crew."""
    opened = books.ledger.start(1, unit.positions, "w") if unit.kind == "train" else dict.fromkeys(unit.positions, 0)
    books.view.begin(unit)
    return Flight(unit, SimpleNamespace(name="w"), opened)


def finish(books, *positions):
    flight = fly(books, WorkUnit("train", "dog", positions))
    for position in positions:
        books.finish(flight, position, RESULT)
    books.close(flight, 1.0)


def after(books, *positions):
    return fly(books, WorkUnit("after", "dog", positions))


def test_a_kill_while_drawing_costs_nobody_what_was_asked(books):
    finish(books, 0, 1, 2)
    flight = after(books, 0, 1, 2)
    books.note_after(0, "generate", "done")
    books.land(flight, KILLED)
    assert list(books.view.after["dog"]) == [0, 1, 2]
    assert books.todo == {0: ["evaluate"], 1: ["generate", "evaluate"], 2: ["generate", "evaluate"]}
    assert books.ledger.afterwards() == {"s0": {"generate": "done"}}


def test_what_crashes_its_trainer_again_and_again_is_given_up_and_its_neighbours_are_done(books):
    finish(books, 0, 1)
    for _ in range(3):
        books.land(after(books, 0, 1), CRASH)
    assert books.ledger.afterwards() == {"s0": {"generate": "died of SIGABRT"}}
    assert books.todo == {0: ["evaluate"], 1: ["generate", "evaluate"]}
    flight = after(books, 0, 1)
    assert books.note_after(0, "evaluate", "done") and not books.note_after(1, "generate", "done")
    assert books.note_after(1, "evaluate", "done")
    flight.open.clear()
    books.close(flight, 2.0)
    assert books.todo == {} and not books.view.after["dog"]


def test_the_next_driver_tries_what_failed_and_leaves_what_is_done(books, tmp_path):
    finish(books, 0, 1)
    for position, name, outcome in ((0, "generate", "done"), (0, "evaluate", "IndexError"), (1, "generate", "done")):
        books.note_after(position, name, outcome)
    again = Books(books.ledger, books.limits, ASKED, books.screen)
    assert again.todo == {0: ["evaluate"], 1: ["evaluate"]} and list(again.view.after["dog"]) == [0, 1]
    other = Books(books.ledger, books.limits, {"generate": "", "evaluate": "thorough"}, books.screen)
    assert other.todo == {0: ["evaluate"], 1: ["evaluate"]}
    assert Books(books.ledger, books.limits, {"generate": ""}, books.screen).todo == {}


def test_a_live_retry_waits_with_the_others_like_any_other(books):
    changed = books.ledger.settle(["s3"], ["waiting"], "cancelled", "")
    books.obey([("cancel", changed)])
    assert list(books.view.waiting["dog"]) == [0, 1, 2, 4, 5]
    books.obey([("retry", books.ledger.settle(["s3"], ["cancelled"], "waiting", ""))])
    assert list(books.view.waiting["dog"]) == [0, 1, 2, 3, 4, 5] and not books.view.alone


def test_a_crash_blames_those_that_trained_and_no_others(books):
    """Four of six trained together; the others wait as before."""
    flight = fly(books, WorkUnit("train", "dog", (0, 1, 2, 3, 4, 5), 4))
    books.land(flight, CRASH)
    assert [books.ledger.row(position)["failures"] for position in range(6)] == [1, 1, 1, 1, 0, 0]
    assert [position for _, position in books.view.alone] == [0, 1, 2, 3]
    assert list(books.view.waiting["dog"]) == [4, 5]


def test_suspects_stay_alone_for_the_next_driver(books):
    for _ in range(3):
        books.land(fly(books, WorkUnit("train", "dog", (0,))), KILLED)
        books.view.alone.clear(), books.view.waiting["dog"].appendleft(0)
    again = Books(books.ledger, books.limits, {}, books.screen)
    assert list(again.view.alone) == [("dog", 0)] and list(again.view.waiting["dog"]) == [1, 2, 3, 4, 5]


def test_priors_that_cannot_be_drawn_end_their_subjects_and_are_not_drawn_again(books):
    prior = WorkUnit("prior", "dog")
    for _ in range(3):
        assert not books.view.priors["dog"].ready
        books.land(fly(books, prior), End("error", "the model gives black pictures"))
    assert books.ledger.counts()["quarantined"] == 6 and books.view.empty
    assert not books.view.priors["dog"].todo and not books.view.priors["dog"].drawing
