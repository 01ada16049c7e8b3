"""A worker without Ray: a real warm parent and a real trainer, with calls that arrive out of order."""

import signal
import time
from types import SimpleNamespace

import pytest

from dbtrain.fleet.causes import End
from dbtrain.fleet.messages import Died, Ready, Task
from dbtrain.fleet.processes import born
from dbtrain.fleet.worker import Worker
from tests.kit.fleet_run import SMALL
from tests.kit.main_job import small_config


@pytest.fixture
def worker(tmp_path):
    one = Worker("worker", str(tmp_path), 20)
    yield one
    if one.parent is not None:
        one.parent.close()


@pytest.mark.slow
def test_a_late_halt_spares_a_newer_trainer(worker, tmp_path):
    """An actor's calls run on several threads, so `halt` may come after the `start` that it was sent before; a gang
    whose member was killed so waited for it for as long as a start may take."""
    task = Task(small_config(*SMALL).model_dump(mode="json"), str(tmp_path))
    second = worker.start(task, 2)
    worker.halt(2)
    assert heard(worker) == (2, Ready)
    assert worker.start(task, 1) == second, "a start that was given up does nothing"
    start = born(second)
    assert start and worker.generation == 2

    worker.halt(3)
    assert born(second) != start
    assert worker.start(task, 2) == 0, "a trainer that was halted before it began"
    assert worker.poll(0.1) == (2, [])
    worker.start(task, 3)
    assert heard(worker) == (3, Ready)
    worker.give(b"no order that a trainer could read", 2)
    assert worker.poll(1.0) == (3, []), "an order to a trainer that is dead is not the next one's"


def full(*_, **__):
    raise OSError(28, "No space left on device", "worker.log")


def crowded(*_, **__):
    raise BlockingIOError(11, "Resource temporarily unavailable")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("place, broken, end", [
    ("pathlib.Path.mkdir", full, ("disk", "worker.log: No space left on device; free space on that disk, then run")),
    ("subprocess.Popen", crowded, ("error", "BlockingIOError: [Errno 11] Resource temporarily unavailable")),
])  # fmt: skip
def test_a_warm_parent_that_cannot_start_is_told_and_tried_again(worker, monkeypatch, place, broken, end):
    """It was waited for without end, in silence, and nothing else could be asked of the worker."""
    with monkeypatch.context() as patch:
        patch.setattr(place, broken)
        assert worker.start(Task({}, str(worker.out)), 1) == 0
    generation, [died] = worker.poll(1.0)
    assert isinstance(died, Died) and (generation, died.end.cause) == (1, end[0]) and died.end.reason.startswith(end[1])
    assert worker._warm() is None and worker.parent is not None


def test_a_kill_for_memory_counts_while_an_order_is_at_work(tmp_path, monkeypatch):
    """Another container's, between the trainer's start and the order, says nothing of a kill from outside."""
    kills = [4]
    monkeypatch.setattr("dbtrain.fleet.worker.oom_kills", lambda: kills[0])
    one = Worker("worker", str(tmp_path), 20)
    one.trainer, one.parent = 1, SimpleNamespace(wait=lambda: signal.SIGKILL, close=lambda: None)
    kills[0] = 5
    one.give(b"order", 0)
    assert one._reap() == End("killed", "died of SIGKILL")
    kills[0] = 6
    assert one._reap() == End("oom", "the kernel killed it for memory")


def heard(worker):
    """Generation and class of the first message."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        generation, messages = worker.poll(1.0)
        if messages:
            return generation, type(messages[0])
    raise AssertionError("the trainer said nothing")
