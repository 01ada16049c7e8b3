"""The fault kit does what it says, or the campaigns would prove nothing."""

import errno
import random
import signal
import subprocess
import sys

import pytest

from dbtrain.storage.atomic import write_file
from tests.faults.damage import DAMAGES
from tests.faults.kit import Fault, environment, forked, trace

CONTENT = b"0123456789" * 100


def operations(root):
    def work():
        write_file(root / "a", CONTENT)

    return work


def test_every_file_operation_is_seen_in_order(tmp_path):
    seen = [line.split()[0] for line in trace(operations(tmp_path), tmp_path)]
    assert seen == ["open", "write", "fsync", "rename", "fsync"]
    assert trace(operations(tmp_path), tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    "at, left",
    [(1, {}), (2, {".tmp": 500}), (3, {".tmp": 1000}), (4, {".tmp": 1000}), (5, {"a": 1000}), (6, {"a": 1000})],
)
def test_a_kill_strikes_before_the_operation_and_tears_a_write(tmp_path, at, left):
    ending = forked(operations(tmp_path), Fault("kill", at), tmp_path)
    assert ending.code == (-signal.SIGKILL if at < 6 else 0)
    assert {path.suffix or path.name: path.stat().st_size for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize("synced, size", [(True, 1000), (False, 0)])
def test_a_power_cut_loses_what_was_not_synced(tmp_path, synced, size):
    import os

    def work():
        with open(tmp_path / "a", "wb") as file:
            file.write(CONTENT)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        os.rename(tmp_path / "a", tmp_path / "b")
        (tmp_path / "end").mkdir()

    ending = forked(work, Fault("cut", 1, ("mkdir",)), tmp_path)
    assert ending.code == -signal.SIGKILL
    assert (tmp_path / "b").stat().st_size == size


@pytest.mark.parametrize("kind", ["open", "write", "fsync", "rename"])
@pytest.mark.parametrize("name", ["ENOSPC", "EIO"])
def test_an_operation_fails_with_the_ordered_error(tmp_path, kind, name):
    (tmp_path / "a").write_bytes(b"old")

    def work():
        try:
            write_file(tmp_path / "a", CONTENT)
        except OSError as error:
            raise SystemExit(error.errno) from None

    assert forked(work, Fault(name, 1, (kind,)), tmp_path).code == getattr(errno, name)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_a_full_disk_stays_full(tmp_path):
    def work():
        failed = 0
        for name in "abc":
            try:
                (tmp_path / name).write_bytes(CONTENT)
            except OSError:
                failed += 1
        raise SystemExit(failed)

    assert forked(work, Fault("ENOSPC", 2, ("write",)), tmp_path).code == 1
    assert forked(work, Fault("ENOSPC", 2, ("write",), forever=True), tmp_path).code == 2


def test_any_python_process_can_be_given_a_fault(tmp_path):
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'a')!r}).write_text('x' * 100)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(Fault("kill", 2), tmp_path), check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "x" * 50


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_always_changes_the_file_and_is_the_same_for_a_seed(tmp_path, name):
    results = []
    for seed in (*range(20), 0):
        (tmp_path / "a").write_bytes(CONTENT + bytes(1000))
        DAMAGES[name](tmp_path / "a", random.Random(seed))
        results.append((tmp_path / "a").read_bytes())
        assert results[-1] != CONTENT + bytes(1000)
    assert results[0] == results[-1]
