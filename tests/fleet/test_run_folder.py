"""Who is to blame for a refused file: a worker's look at the run's folder before it says so."""

import errno
import json
import os
import socket
from types import SimpleNamespace

import pytest

from dbtrain.fleet import run_folder
from dbtrain.fleet.causes import End
from dbtrain.fleet.messages import Died, Failed, Published, Task
from dbtrain.fleet.run_folder import NAME, mark, trouble_of
from dbtrain.fleet.worker import Worker
from dbtrain.results.record import NEEDED

BAD_SECTOR = "photos/a.png: Input/output error; the disk or network share failed; check it"


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def worker(out):
    one = Worker("worker", str(out), 20)
    one.token = mark(out)
    return one


def failed(cause, reason):
    return Failed(1, 0, End(cause, reason), 1.5)


def refuse(monkeypatch, number):
    def write_file(path, content):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(run_folder, "write_file", write_file)


def test_a_folder_has_one_token_for_good_and_takes_a_file(out, tmp_path):
    token = mark(out)
    assert len(token) == 16 and mark(out) == token != mark(tmp_path)
    assert trouble_of(out, token) is trouble_of(out, token, write=True) is None
    assert [path.name for path in out.iterdir()] == [NAME], "nothing is left behind"


@pytest.mark.parametrize("number, told", [(errno.EIO, "check it"), (errno.ENOTCONN, "mount it again")])
def test_a_folder_that_takes_no_file_says_why(out, monkeypatch, number, told):
    token = mark(out)
    refuse(monkeypatch, number)
    assert trouble_of(out, token) is None
    assert told in trouble_of(out, token, write=True)


def test_a_disk_that_gives_back_something_else_does_not_work(out, monkeypatch):
    monkeypatch.setattr(run_folder, "write_file", lambda path, content: path.write_bytes(bytes(len(content))))
    assert "Input/output error" in trouble_of(out, "", write=True)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("there", [None, "0123456789abcdef", "\xff\xfe"])
def test_another_folder_under_the_same_path_is_not_the_runs(out, there):
    token = mark(out)
    (out / NAME).unlink()
    if there is not None:
        (out / NAME).write_bytes(there.encode("latin-1"))
    told = f"{out} is not the run's folder on this machine ({socket.gethostname()}); mount it"
    assert trouble_of(out, token) == told


def test_a_worker_without_the_mount_starts_nothing_and_leaves_nothing(worker, out):
    token = worker.token
    (out / NAME).unlink()
    assert worker.start(Task({}, str(out), token=token), 1) == 0
    generation, [died] = worker.poll(1.0)
    assert (generation, type(died), died.end.cause) == (1, Died, "unmounted") and died.end.reason.endswith("; mount it")
    assert worker.parent is None and list(out.iterdir()) == []


def test_a_warm_parent_forks_nothing_once_the_mount_is_lost(worker, out):
    closed = []
    worker.parent = SimpleNamespace(fork=pytest.fail, wait=pytest.fail, close=lambda: closed.append(True))
    assert worker.start(Task({}, str(out), token="another"), 1) == 0
    assert worker.poll(1.0)[1][0].end.cause == "unmounted" and closed == [True] and worker.parent is None


@pytest.mark.parametrize("cause", ["file", "error", "crash", "oom", "hang"])
def test_a_mount_that_is_lost_midway_blames_nobody(worker, out, cause):
    assert worker._hear(failed("error", "torn")) == [failed("error", "torn")]
    (out / NAME).unlink()
    [message] = worker._hear(failed(cause, "torn"))
    assert message == failed("unmounted", message.end.reason) and message.end.reason.endswith("; mount it")
    assert worker._weighed(End("killed", "died of SIGKILL")) == End("killed", "died of SIGKILL")


def test_a_trainers_end_is_weighed_too(worker, out, monkeypatch):
    """A reason that was told before the end, of a trainer whose pipe has closed."""
    worker.start(Task({}, str(out), token="another"), 1)
    worker.token, worker.end = mark(out), End("file", BAD_SECTOR)
    refuse(monkeypatch, errno.EIO)
    assert worker.poll(1.0)[1][0].end.cause == "disk"


def test_a_file_is_its_subjects_where_the_folder_takes_others(worker, out, monkeypatch):
    assert worker._hear(failed("file", BAD_SECTOR)) == [failed("file", f"{BAD_SECTOR}; {out} itself works")]
    refuse(monkeypatch, errno.EIO)
    [message] = worker._hear(failed("file", BAD_SECTOR))
    assert message.end.cause == "disk" and "the disk or network share failed" in message.end.reason
    assert worker._hear(failed("disk", "full")) == [failed("disk", "full")]
    assert worker._hear(failed("error", "torn")) == [failed("error", "torn")], "no file was refused"


def test_files_that_the_disk_does_not_give_back_are_weighed(worker, out):
    """/proc/self/mem gives EIO to whoever reads its first byte; the folder beside it works."""
    (out / "subjects" / "a").mkdir(parents=True)
    (out / "subjects" / "a" / "w").symlink_to("/proc/self/mem")
    (out / "subjects" / "a" / "record.json").write_text(json.dumps({**dict.fromkeys(NEEDED, "a"), "files": {"w": "0"}}))
    [message] = worker._hear(Published(1, 0, "a", 1.5))
    assert "the disk or network share failed" in message.end.reason and message.end.reason.endswith("itself works")
    assert message == failed("file", message.end.reason)
    (out / "subjects" / "a" / "w").unlink()
    [message] = worker._hear(Published(1, 0, "a", 1.5))
    assert message.end.cause == "error" and message.end.reason.startswith("published files do not verify: ")
