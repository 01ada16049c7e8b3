"""A crew by itself: when its members' messages reach the driver, and whom it kills."""

import subprocess
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from dbtrain.fleet.causes import End
from dbtrain.fleet.crew import Crew, Shape, kill_same
from dbtrain.fleet.messages import Died, Failed, Ready, Task
from dbtrain.fleet.processes import born

LOST, KILLED = End("lost", "connection closed by peer"), End("killed", "died of SIGKILL")


class Calls:
    """Stands for an actor: every method only notes that it was called."""

    def __init__(self, rank):
        self.rank, self.called = rank, []

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *arguments: self.called.append(name) or (self.rank, len(self.called)))


@pytest.fixture
def crew(monkeypatch):
    """Two members that train as one, whose trainers load the base."""
    monkeypatch.setattr("dbtrain.fleet.crew.placement_group", lambda bundles: None)
    monkeypatch.setattr(Crew, "_member", lambda self, rank: Calls(rank))
    gang = Crew("worker-001", Shape(2, 0, 1, 20), Task({}, "out"))
    for rank in range(2):
        gang._placed(rank, {"host": "here", "pid": 1, "born": "1", "node": "n", "ip": "127.0.0.1"})
    return gang


def test_a_gang_is_ready_with_its_last_member(crew):
    assert crew.state == "starting" and crew._heard(0, (1, [Ready("base")])) == []
    assert crew._heard(1, (1, [Ready("base")])) == [Ready("base")] and crew.state == "idle"


def test_a_gang_dies_once_for_the_reason_that_explains_it_and_starts_anew(crew):
    assert crew._heard(0, (1, [Died(LOST)])) == [] and crew.state == "dying"
    assert crew._heard(1, (1, [Died(KILLED)])) == [Died(KILLED)]
    assert (crew.state, crew.generation, crew.restarts) == ("starting", 2, 1)
    late = Failed(1, 0, LOST, 1.0)
    assert crew._heard(0, (1, [late])) == [] and crew._heard(0, (2, [late])) == [late]


def test_a_pid_that_another_process_has_now_is_not_killed():
    with subprocess.Popen(["sleep", "60"]) as process:
        kill_same(process.pid, "1")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        kill_same(process.pid, born(process.pid))
        assert process.wait(5) == -9
