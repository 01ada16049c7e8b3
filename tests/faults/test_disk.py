"""Disks that are full, read-only or forbidden, for real: one line, a clean state, and the same command goes on."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.storage.atomic import LOCK, file_digest, held
from dbtrain.storage.trouble import disk_trouble
from tests.faults.campaigns import Works, half_written, result_of
from tests.faults.damage import as_nobody, read_only, small_disk
from tests.faults.kit import Fault, forked
from tests.kit.forked import dbtrain
from tests.kit.main_job import environment, start, write_job

TINY = ("--config", "tiny")


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    return Works(tmp_path_factory.mktemp("works") / "works")


@pytest.fixture(scope="module")
def finished(works, tmp_path_factory):
    """A finished run, copied before it is harmed."""
    root = tmp_path_factory.mktemp("finished")
    ending = forked(works.train(root), None, root)
    assert ending.code == 0, ending.stderr
    return root


def photos(works) -> dict[Path, tuple[int, str]]:
    files = [path for path in (works.folder / "input").rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, file_digest(path)) for path in files}


def mounted(mount, *words):
    try:
        return mount(*words)
    except PermissionError as error:
        pytest.skip(f"mounting takes more rights here: {error}")


@pytest.mark.parametrize("size", ["16k", "128k"])
def test_a_disk_that_fills_up_ends_a_run_in_one_line_and_room_lets_it_go_on(works, finished, tmp_path, size):
    """The mount keeps its name and grows, so that the same command finds the same paths."""
    before, root = photos(works), tmp_path / "root"
    disk = small_disk(root, size)
    mounted(disk.__enter__)
    try:
        full = forked(works.train(root), None, root)
        assert full.code == 3 and "Traceback" not in full.stderr, full.stderr
        assert "No space left on device; free space on that disk, then run the same command again" in full.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", root], check=True)
        again = forked(works.train(root), None, root)
        assert again.code == 0, again.stderr
        assert result_of(root) == result_of(finished)
        assert half_written(root) == []
    finally:
        disk.__exit__(None, None, None)
    assert photos(works) == before


def test_a_read_only_folder_is_one_line_and_untouched(works, finished, tmp_path):
    root = Path(shutil.copytree(finished, tmp_path / "root"))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    disk = read_only(root)
    mounted(disk.__enter__)
    try:
        ending = forked(works.train(root), None, root)
        assert ending.code == 3 and "Traceback" not in ending.stderr, ending.stderr
        assert "Read-only file system; it is mounted for reading only; choose a folder" in ending.stderr
    finally:
        disk.__exit__(None, None, None)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_a_folder_without_the_right_to_write_is_one_line():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)
        write_job(folder, subjects="rex:dog")
        words = ["shard", "make", folder / "photos.csv", "--out", folder / "shards", *TINY, "data.resolution=32"]
        command = as_nobody([sys.executable, "-m", "dbtrain", *map(str, words)])
        done = subprocess.run(
            command, env={**environment(), "HOME": place}, capture_output=True, text=True, check=False
        )
        if "No module named" in done.stderr or "can't open" in done.stderr or done.returncode == 126:
            pytest.skip("another user cannot read this checkout")
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
        assert "Permission denied; this user has no right to it" in done.stderr
        assert not (folder / "shards").exists()


@pytest.mark.parametrize("name", ["EROFS", "EDQUOT"])
def test_a_right_that_is_lost_midway_is_one_line_and_coming_back_goes_on(works, finished, tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    lost = forked(works.train(root), Fault(name, 60, forever=True), root)
    assert lost.code == 3 and "Traceback" not in lost.stderr, lost.stderr
    assert "then run the same command again: what was finished is kept" in lost.stderr
    again = forked(works.train(root), None, root)
    assert again.code == 0, again.stderr
    assert result_of(root) == result_of(finished)


@pytest.mark.parametrize(
    "at, name", [(8, "SIGTERM"), (34, "SIGUSR1"), (60, "SIGTERM"), (75, "SIGUSR1"), (110, "SIGTERM")]
)
def test_a_request_to_stop_is_75_in_every_phase_and_loses_nothing(works, finished, tmp_path, at, name):
    """Sharding, priors, encoding, training, publishing, by the number of the file operation that it comes at."""
    root = tmp_path / "root"
    root.mkdir()
    stopped = forked(works.train(root), Fault(name, at), root)
    assert stopped.code in (75, 0) and "Traceback" not in stopped.stderr, stopped.stderr
    assert stopped.code == 75 or at > 100
    again = forked(works.train(root), None, root)
    assert again.code == 0, again.stderr
    assert result_of(root) == result_of(finished)


WRONG_PATHS = [
    (["shard", "make", "m.csv", *TINY, "--out", "file"], "file: File exists; something else has that name"),
    (["shard", "make", "m.csv", *TINY, "--out", "file/sub"], "file/sub: Not a directory; a part of the path is a file"),
    (["train", "m.csv", "--subject", "rex", "--config", "tiny", "--out", "file"], "file: File exists"),
    (["train", "m.csv", "--subject", "rex", "--config", "tiny", "--out", "file/sub"], "file/sub: Not a directory"),
]


@pytest.mark.parametrize("words, told", WRONG_PATHS)
def test_a_path_that_cannot_be_is_one_line(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path, subjects="rex:dog")
    (tmp_path / "photos.csv").rename("m.csv")
    (tmp_path / "file").touch()
    done = dbtrain(words)
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: {told}") and done.stderr.count("\n") == 1


def test_a_path_that_cannot_be_has_a_traceback_on_request(tmp_path):
    manifest, *_ = write_job(tmp_path, subjects="rex:dog")
    (tmp_path / "file").touch()
    words = ["--traceback", "shard", "make", str(manifest), *TINY, "--out", str(tmp_path / "file")]
    assert isinstance(CliRunner().invoke(cli.app, words).exception, OSError)


def test_a_mistake_of_ours_keeps_its_traceback():
    """A lookup among files that names no file is nothing that a user could mend."""
    assert disk_trouble(FileNotFoundError("no such entry")) is None
    assert disk_trouble(KeyError("no such entry")) is None


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(tmp_path):
    words = ["train", *write_job(tmp_path / "job", subjects="rex:dog"), "--subject", "rex", "--out", tmp_path / "out"]
    with held(tmp_path / "out" / LOCK) as ours:
        assert ours
        second = dbtrain(words)
        assert second.returncode == 3
        assert f"{tmp_path / 'out'}: another run is working there; wait for it or stop it" in second.stderr
        assert {path.name for path in (tmp_path / "out").iterdir()} <= {LOCK, "run.json"}


def test_a_kill_gives_the_folder_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from dbtrain.storage.atomic import held\n"
        "with held(Path(sys.argv[1])) as ours:\n    print(ours, flush=True); time.sleep(60)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / LOCK], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "True\n"
    with held(tmp_path / LOCK) as ours:
        assert not ours
    first.kill()
    first.wait()
    with held(tmp_path / LOCK) as ours:
        assert ours


def test_a_request_to_stop_before_training_is_75(tmp_path):
    import signal
    import time

    words = ["train", *write_job(tmp_path / "job", subjects="rex:dog"), "--subject", "rex", "--out", tmp_path / "out"]
    process = start(words)
    deadline = time.monotonic() + 60
    # As soon as its handler is there: the bit of SIGTERM in the mask of caught signals.
    while not int(caught(process.pid), 16) >> (signal.SIGTERM - 1) & 1:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert "stopped on request" in process.communicate()[1]


def caught(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("SigCgt"))
