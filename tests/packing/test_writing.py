"""The thread that writes: in order, bounded, and heard where it fails."""

import threading
from types import SimpleNamespace

import pytest

from dbtrain.packing.writing import Writer

REX, TOM = SimpleNamespace(id="rex"), SimpleNamespace(id="tom")


@pytest.fixture
def told():
    return []


@pytest.fixture
def writer(told):
    made = Writer(2, lambda subject, outcome: told.append((subject.id, outcome, threading.current_thread())))
    yield made
    made.close()


def test_subjects_are_told_here_once_their_results_are_written_there(writer, told):
    gate, threads = threading.Event(), []

    def work(outcome):
        gate.wait(60)
        threads.append(threading.current_thread())
        return outcome

    writer.write(None, work, "a checkpoint")
    writer.write(REX, work, "done")
    writer.tell_written()
    assert not told and (writer.ended, writer.ending) == (0, 1)
    gate.set()
    writer.tell_written(wait=True)
    here = threading.current_thread()
    assert told == [("rex", "done", here)] and (writer.ended, writer.ending) == (1, 0)
    assert here not in threads and len(threads) == 2
    writer.tell(TOM, "failed")
    assert told[1] == ("tom", "failed", here) and writer.ended == 2


def test_the_queue_waits_for_its_oldest_entry(writer, told):
    for number in range(5):
        writer.write(REX, lambda number=number: number)
    assert [outcome for _, outcome, _ in told] == [0, 1, 2] and writer.ending == 2


def test_what_comes_afterwards_comes_after_all_before(writer):
    order, gate = [], threading.Event()
    writer.write(None, lambda: gate.wait(60) and order.append("checkpoint"))
    writer.afterwards(lambda: order.append("unlocked"))
    gate.set()
    writer.close()
    assert order == ["checkpoint", "unlocked"]


def test_a_write_that_fails_is_heard(writer):
    def full():
        raise OSError(28, "No space left on device")

    writer.write(REX, full)
    with pytest.raises(OSError, match="No space left"):
        writer.tell_written(wait=True)
    assert writer.ended == 0
