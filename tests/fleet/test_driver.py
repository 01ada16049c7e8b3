"""The driver's decisions about ends of trainers, with a real ledger and without Ray."""

from types import SimpleNamespace

import pytest

from dbtrain.data.index import Index
from dbtrain.errors import FleetError
from dbtrain.fleet.books import Flight
from dbtrain.fleet.driver import Driver
from dbtrain.fleet.ledger import Ledger
from dbtrain.fleet.run import Options
from dbtrain.fleet.schedule import WorkUnit
from tests.main_job import small_config

CREW = SimpleNamespace(name="worker-001")


@pytest.fixture
def driver(tmp_path):
    ledger = Ledger(tmp_path, create=True)
    with ledger.commit():
        about = dict.fromkeys(("config", "config_digest", "manifest", "manifest_digest"), "")
        ledger.create_run(about, [{"id": f"s{number}", "class_noun": "dog"} for number in range(9)])
    yield Driver(ledger, Index((), ()), small_config(), tmp_path, Options(quiet=True))
    ledger.close()


def fly(driver, *positions, kind="train", pack=1):
    """A unit that the crew is at, by number."""
    unit = WorkUnit(kind, "dog", positions, pack)
    driver.units += 1
    opened = driver.ledger.start(driver.units, positions, CREW.name) if kind == "train" else dict.fromkeys(positions, 0)
    retried = [entry for entry in driver.books.view.alone if entry[1] in positions]
    for entry in retried:
        driver.books.view.alone.remove(entry)
        driver.books.view.waiting["dog"].appendleft(entry[1])
    driver.books.view.begin(unit)
    driver.flights[driver.units] = Flight(unit, CREW, opened, pack)
    return driver.units


@pytest.mark.parametrize("cause", ["error", "lost", "device", "hang"])
def test_a_worker_that_cannot_start_ends_the_run_whatever_keeps_it(driver, cause):
    for _ in range(2):
        driver.on_died(CREW, ("died", cause, "CUDA error: no device"))
    with pytest.raises(FleetError, match="worker-001: its trainer cannot start: CUDA error: no device"):
        driver.on_died(CREW, ("died", cause, "CUDA error: no device"))


def test_kills_from_outside_are_no_failed_starts(driver):
    for _ in range(9):
        driver.on_died(CREW, ("died", "killed", "died of SIGKILL"))
    assert driver.bad_starts == {} and driver.disk is None


def test_a_subject_that_kills_every_gpu_is_alone_soon_and_given_up_in_the_end(driver):
    for number in range(driver.options.losses):
        fly(driver, 0)
        driver.on_died(CREW, ("died", "device", "CUDA error: an illegal memory access was encountered"))
        row = driver.ledger.row(0)
        assert (row["failures"], row["losses"]) == (0, number + 1)
        assert bool(driver.books.view.alone) == (2 <= number < driver.options.losses - 1)
    assert row["state"] == "quarantined" and not driver.books.view.alone
