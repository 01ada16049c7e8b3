"""Real warm parents, a machine's and the workers', and what they fork."""

import os
import signal
import socket
import time
from contextlib import contextmanager
from multiprocessing import Pipe

import psutil
import pytest

from dbtrain.fleet.messages import Leaving, Task
from dbtrain.fleet.warm_parent import LINGER_S, WarmParent, connect, hosting, new_name, peer, start_host

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The name of this machine's warm parent, which has its imports behind it for all tests."""
    with hosting(tmp_path_factory.mktemp("host") / "log", 1) as name:
        yield name


@contextmanager
def warm(folder, host, name="worker"):
    parent = WarmParent(folder / "logs" / f"{name}.log", host)
    try:
        yield parent
    finally:
        parent.close()


def trainer_of(parent):
    """(a new trainer, the pipe to it)."""
    link, theirs = Pipe()
    pid = parent.fork(theirs.fileno())
    theirs.close()
    return psutil.Process(pid), link


def gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_trainers_are_forked_reaped_and_die_with_their_parent(tmp_path, host):
    with warm(tmp_path, host) as parent:
        trainer, link = trainer_of(parent)
        assert trainer.ppid() == parent.pid
        link.send(Task({"no": "recipe"}, str(tmp_path)))
        message = link.recv()
        assert isinstance(message, Leaving) and message.end.cause == "error"
        assert parent.wait() == 70 << 8 and "no" in (tmp_path / "logs" / "worker.log").read_text()

        trainer, _ = trainer_of(parent)
        parent.kill()
        wait_for(lambda: gone(trainer))
        with pytest.raises(OSError):
            parent.wait()


def test_workers_have_a_warm_parent_each_with_their_own_environment_and_die_alone(tmp_path, host, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with warm(tmp_path, host, "one") as one, warm(tmp_path, host, "two") as two:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
        first, _ = trainer_of(one)
        second, _ = trainer_of(two)
        of_host = psutil.Process(one.pid).ppid()
        assert psutil.Process(two.pid).ppid() == of_host == peer(two.control)[0] != os.getpid()
        one.kill()
        with pytest.raises(OSError):
            one.wait()  # not for ever, though the other was forked beside it
        one.close()
        wait_for(lambda: gone(first))
        with warm(tmp_path, host, "one") as again:
            assert not gone(trainer_of(again)[0])
            assert psutil.Process(again.pid).cpu_times().user < 2, "nothing is imported again"
        assert not gone(second)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_warm_parent_dies_with_its_worker_also_while_it_is_stopped(tmp_path, host, stopped):
    with warm(tmp_path, host) as parent:
        trainer, _ = trainer_of(parent)
        process = psutil.Process(parent.pid)
        if stopped:
            process.send_signal(signal.SIGSTOP)
        parent.control.close()  # as the kernel does for a worker that is killed
        wait_for(lambda: gone(process) and gone(trainer))


def test_what_a_killed_machines_warm_parent_forked_works_on_and_the_next_worker_starts_another(tmp_path):
    name = new_name()
    process = start_host(name, tmp_path / "log", os.getpid())
    with warm(tmp_path, name) as parent:
        trainer_of(parent)
        process.kill()
        process.wait()
        second, _ = trainer_of(parent)
        assert not gone(second)
        with warm(tmp_path, name, "late") as late:
            other, _ = trainer_of(late)
            started = psutil.Process(other.ppid()).parent()
            assert started.pid != process.pid and not gone(other)
    wait_for(lambda: gone(started), LINGER_S + 20)


def test_two_that_start_a_machines_warm_parent_at_once_share_one(tmp_path):
    name = new_name()
    processes = [start_host(name, tmp_path / "log") for _ in range(2)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        wait_for(lambda: link.connect_ex(f"\0{name}") == 0)
        wait_for(lambda: sum(process.poll() is None for process in processes) == 1)
        assert peer(link)[0] in {process.pid for process in processes}
    for process in processes:
        process.kill()
        process.wait()


def test_a_connection_that_says_nothing_keeps_nobody_waiting(tmp_path, host):
    connect(host, tmp_path / "mute.log").close()
    with warm(tmp_path, host) as parent:
        assert not gone(trainer_of(parent)[0])
