"""A real warm parent and what it forks."""

import time
from multiprocessing import Pipe

import psutil
import pytest

from dbtrain.fleet.messages import Leaving, Task
from dbtrain.fleet.warm_parent import WarmParent


@pytest.mark.slow
def test_trainers_are_forked_reaped_and_die_with_their_parent(tmp_path):
    parent = WarmParent(tmp_path / "logs" / "worker.log")
    try:
        link, theirs = Pipe()
        pid = parent.fork(theirs.fileno())
        theirs.close()
        assert psutil.Process(pid).ppid() == parent.process.pid
        link.send(Task({"no": "recipe"}, str(tmp_path)))
        message = link.recv()
        assert isinstance(message, Leaving) and message.end.cause == "error"
        assert parent.wait() == 70 << 8

        link, theirs = Pipe()
        trainer = psutil.Process(parent.fork(theirs.fileno()))
        parent.kill()
        end = time.monotonic() + 10
        while trainer.is_running() and trainer.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end
            time.sleep(0.02)
        with pytest.raises(OSError):
            parent.wait()
    finally:
        parent.close()
