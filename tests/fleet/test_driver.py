"""The driver's decisions about ends of trainers, with a real ledger and without Ray."""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from dbtrain.data.index import Index
from dbtrain.errors import FleetError
from dbtrain.fleet.books import Flight
from dbtrain.fleet.causes import End
from dbtrain.fleet.driver import Driver
from dbtrain.fleet.messages import Died, Failed, Finished, Measure, Ready, Task
from dbtrain.fleet.options import Options
from dbtrain.fleet.schedule import WorkUnit
from dbtrain.subjects.forgotten import PENDING, change_pending
from tests.kit.fleet_run import run_of_dogs
from tests.kit.main_job import small_config
from tests.kit.published import make_result

CREW = SimpleNamespace(name="worker-001", bad_starts=0)


@pytest.fixture
def driver(tmp_path):
    CREW.bad_starts = 0
    with run_of_dogs(tmp_path, 9) as ledger:
        yield Driver(ledger, Index((), ()), small_config(), tmp_path, Options(quiet=True))


def fly(driver, *positions, kind="train", pack=1):
    """A unit that the crew is at, by number."""
    unit = WorkUnit(kind, "dog", positions, pack)
    number = next(driver.numbers)
    opened = driver.ledger.start(number, positions, CREW.name) if kind == "train" else dict.fromkeys(positions, 0)
    retried = [entry for entry in driver.books.view.alone if entry[1] in positions]
    for entry in retried:
        driver.books.view.alone.remove(entry)
        driver.books.view.waiting["dog"].appendleft(entry[1])
    driver.books.view.begin(unit)
    driver.flights[number] = Flight(unit, CREW, opened)
    return number


@pytest.mark.parametrize("cause", ["error", "lost", "device", "hang"])
def test_a_worker_that_cannot_start_ends_the_run_whatever_keeps_it(driver, cause):
    for _ in range(2):
        driver.enter(CREW, Died(End(cause, "CUDA error: no device")))
    with pytest.raises(FleetError, match="worker-001: its trainer cannot start: CUDA error: no device"):
        driver.enter(CREW, Died(End(cause, "CUDA error: no device")))


def test_kills_from_outside_are_no_failed_starts(driver):
    for _ in range(9):
        driver.enter(CREW, Died(End("killed", "died of SIGKILL")))
    assert CREW.bad_starts == 0 and driver.disk is None


def test_a_subject_that_kills_every_gpu_is_alone_soon_and_given_up_in_the_end(driver):
    for number in range(driver.options.losses):
        fly(driver, 0)
        driver.enter(CREW, Died(End("device", "CUDA error: an illegal memory access was encountered")))
        row = driver.ledger.row(0)
        assert (row["failures"], row["losses"]) == (0, number + 1)
        assert bool(driver.books.view.alone) == (2 <= number < driver.options.losses - 1)
    assert row["state"] == "quarantined" and not driver.books.view.alone


REASON = "photos/a.png: Input/output error; the disk or network share failed; check it"


def fail(driver, position, cause="file"):
    driver.enter(CREW, Failed(fly(driver, position), position, End(cause, REASON), 1.0))
    return driver.ledger.row(position)


def test_a_subject_whose_own_file_is_refused_is_given_up_and_the_run_goes_on(driver):
    for failures in (1, 2, 3):
        row = fail(driver, 0)
        assert (row["failures"], row["losses"], row["cause"], row["reason"]) == (failures, 0, "file", REASON)
    assert row["state"] == "quarantined" and driver.disk is None
    fly(driver, 1)
    driver.enter(CREW, Died(End("file", REASON)))
    assert driver.ledger.row(1)["failures"] == 1 and driver.disk is None and CREW.bad_starts == 0


def test_a_full_disk_ends_the_run_and_blames_nobody(driver):
    row = fail(driver, 0, "disk")
    assert (row["state"], row["failures"], driver.disk) == ("waiting", 0, REASON)


def test_files_of_many_subjects_in_a_row_are_the_disk(driver):
    for position in range(4):
        fail(driver, position)
    result = {"run": "r", "files": {}, "gpu_seconds": 1.0, "stages_s": {"train": 1.0}}
    driver.enter(CREW, Finished(fly(driver, 8), 8, result))
    for position in (4, 5, 6, 7, 7):
        fail(driver, position)
    assert driver.disk is None, "one was finished in between"
    row = fail(driver, 0)
    assert (driver.disk, row["state"], row["failures"], row["cause"]) == (REASON, "waiting", 1, "disk")


@pytest.mark.parametrize("kind", ["prior", None])
def test_a_refused_file_that_is_no_subjects_own_ends_the_run(driver, kind):
    """Of the base, or of the priors that a class shares."""
    if kind:
        fly(driver, kind=kind)
    driver.enter(CREW, Died(End("file", REASON)))
    assert driver.disk == REASON and CREW.bad_starts == 0 and driver.ledger.counts()["waiting"] == 9


def test_packs_of_auto_have_one_size_which_is_measured_once(tmp_path):
    """No subject is given out before, later trainers are not asked again, nor is the next driver's."""
    config, options = small_config("engine.kind=packed", "prior.weight=0"), Options(quiet=True, unit=3)
    with run_of_dogs(tmp_path, 9) as ledger:
        driver = Driver(ledger, Index((), ()), config, tmp_path, options)
        crew = SimpleNamespace(
            name="worker-001", task=Task({}, ".", measure=Measure(None, 9)), state="idle", last_class=None, orders=[]
        )
        crew.give = crew.orders.append
        driver.crews[crew.name] = crew
        driver.assign()
        assert driver.pack is None and not crew.orders
        driver.enter(crew, Ready("base", 4))
        assert (driver.books.limits.pack, driver.books.limits.unit, crew.task.measure) == (4, 12, None)
        driver.enter(crew, Ready("base"))
        for _ in range(2):
            driver.assign()
        assert [(order.unit.kind, order.unit.pack) for order in crew.orders][-1] == ("train", 4)
        assert Driver(ledger, Index((), ()), config, tmp_path, options).pack == 4


@pytest.mark.parametrize("overrides, gang, pack", [
    ((), 1, 1), (("engine.kind=packed", "engine.packed.size=6"), 1, 6), (("engine.kind=packed",), 2, 1),
    (("engine.packed.size=4",), 1, 4), (("engine.packed.size=4", "train.method=full"), 1, 1),
])  # fmt: skip
def test_packs_that_need_no_measuring(tmp_path, overrides, gang, pack):
    with run_of_dogs(tmp_path, 1) as ledger:
        driver = Driver(ledger, Index((), ()), small_config(*overrides), tmp_path, Options(quiet=True, gang=gang))
        assert (driver.pack, driver.books.limits.pack) == (pack, pack)


def test_a_finished_subject_is_uploaded_while_the_others_wait(tmp_path):
    make_result(tmp_path / "out" / "subjects" / "s3")
    with run_of_dogs(tmp_path / "out", 9) as ledger:
        far = f"publish.to={tmp_path / 'far'}"
        driver = Driver(ledger, Index((), ()), small_config(far), tmp_path / "out", Options(quiet=True))
        result = {"run": "r", "files": {}, "gpu_seconds": 1.0, "stages_s": {"train": 1.0}}
        driver.enter(CREW, Finished(fly(driver, 3), 3, result))
        assert driver.uploads.finish() == {}
    assert [path.parent.name for path in (tmp_path / "far").glob("*/record.json")] == ["s3"]


def test_a_person_is_forgotten_beside_a_driver_and_the_others_go_on(tmp_path, monkeypatch):
    """The workers checkpoint and go first; a subject at work loses nothing but its attempt."""
    with run_of_dogs(tmp_path, 9) as ledger:
        (tmp_path / "shards").mkdir()
        Index((), ()).save(tmp_path / "shards")
        driver = Driver(ledger, Index((), ()), small_config(), tmp_path, Options(quiet=True, grace_s=0.1))
        grown = []
        monkeypatch.setattr(driver, "grow", lambda: grown.append(len(driver.crews)))
        stopped = []
        crew = SimpleNamespace(name=CREW.name, pending={}, overdue=lambda: False, ask_stop=lambda: stopped.append(1),
                               kill=lambda stopped: None, row=dict, state="busy")  # fmt: skip
        fly(driver, 3)
        fly(driver, 4)
        for flight in driver.flights.values():
            flight.crew = crew
        driver.crews[crew.name] = crew
        monkeypatch.setattr(ledger, "note_worker", lambda row: None)
        driver.tick()
        assert not stopped, "nobody is to be forgotten"
        change_pending(tmp_path, {"s3": ["s3"]})
        driver.tick()
        assert stopped and grown == [0] and not driver.flights and not (tmp_path / PENDING).exists()
        assert (ledger.row(3)["state"], ledger.row(4)["state"]) == ("forgotten", "waiting")
        assert ledger.row(4)["failures"] == 0 and 3 not in driver.books.view.waiting["dog"]
        assert list(driver.books.view.waiting["dog"]) == [0, 1, 2, 4, 5, 6, 7, 8] and driver.interrupted == {}


class Member:
    """A crew as the driver sees it, on a machine of its own."""

    def __init__(self, name):
        self.name, self.bad_starts, self.state, self.orders = name, 0, "idle", []
        self.last_class, self.give = None, self.orders.append

    def leave_out(self):
        self.state = "left out"


UNMOUNTED = End("unmounted", "runs/all is not the run's folder on this machine (b); mount it")


@pytest.fixture
def two(driver, monkeypatch):
    """A driver with two crews, and what it says."""
    crews = [Member("worker-001"), Member("worker-002")]
    driver.crews, driver.names = {crew.name: crew for crew in crews}, count(3)
    said = []
    monkeypatch.setattr(driver.screen, "say", said.append)
    return driver, crews, said


def test_a_machine_without_the_mount_is_left_out_with_a_word_and_the_last_one_ends_the_run(two):
    driver, (one, other), said = two
    driver.flights[fly(driver, 0, 1)].crew = other
    driver.enter(other, Died(UNMOUNTED))
    assert other.state == "left out" and driver.disk is None and not driver.flights
    assert said == [f"worker-002: is left out, and the others go on: {UNMOUNTED.reason}; see {driver.out / 'logs'}"]
    assert [driver.ledger.row(at)["failures"] for at in (0, 1)] == [0, 0]
    driver.books.limits = replace(driver.books.limits, prior_parts=0)
    driver.assign()
    assert len(one.orders) == 1 and not other.orders
    driver.enter(one, Died(UNMOUNTED))
    assert driver.disk == UNMOUNTED.reason


def test_a_mount_that_goes_away_under_a_unit_costs_its_subjects_nothing(two):
    driver, (_, other), said = two
    number = fly(driver, 0, 1, 2)
    driver.flights[number].crew = other
    driver.enter(other, Failed(number, 0, UNMOUNTED, 1.0))
    assert other.state == "left out" and not driver.flights and len(said) == 1
    assert driver.ledger.counts()["waiting"] == 9 and driver.ledger.row(1)["losses"] in (0, 1)


def test_a_broken_gpu_is_left_out_and_only_the_last_ends_the_run(two):
    driver, (one, other), said = two
    broken = End("device", "CUDA error: no device")
    for _ in range(3):
        driver.enter(other, Died(broken))
    assert other.state == "left out" and len(said) == 1 and one.state == "idle"
    for _ in range(2):
        driver.enter(one, Died(broken))
    with pytest.raises(FleetError, match="worker-001: its trainer cannot start"):
        driver.enter(one, Died(broken))


def test_who_is_left_out_keeps_its_place_and_another_is_made_where_there_is_room(two, monkeypatch):
    driver, (_, other), _ = two
    made = []
    monkeypatch.setattr("dbtrain.fleet.driver.Crew", lambda name, *rest: made.append(name) or Member(name))
    monkeypatch.setattr("dbtrain.fleet.driver.has_gpus", lambda: False)
    monkeypatch.setattr("dbtrain.fleet.driver.room", lambda gpus, cpus: 3)
    driver.options = replace(driver.options, workers=2)
    driver.grow()
    assert not made
    driver.enter(other, Died(UNMOUNTED))
    driver.grow()
    driver.grow()
    assert len(made) == 1
