import errno
import fcntl
import os

import pytest

from dbtrain.errors import DataError
from dbtrain.storage import atomic


def test_content_is_bytes_or_a_writer(tmp_path):
    atomic.write_file(tmp_path / "a", b"one")
    atomic.write_file(tmp_path / "a", lambda file: file.write(b"two"))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"two")]


def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path, monkeypatch):
    atomic.write_file(tmp_path / "a", b"former")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        atomic.write_file(tmp_path / "a", fail)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: fail(open(os.devnull, "wb")))  # noqa: SIM115
            with pytest.raises(OSError, match="No space"):
                atomic.write_file(tmp_path / "a", b"new")
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"former")]


def test_the_order_is_fsync_rename_fsync_of_the_folder(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        seen.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append("rename"), replace(*names)))
    atomic.write_file(tmp_path / "a", b"x")
    assert seen == ["file", "rename", "folder"]


def test_a_folder_replaces_another_whole(tmp_path):
    final = tmp_path / "final"
    for content in (b"one", b"two"):
        new = tmp_path / "new"
        (new / "sub").mkdir(parents=True)
        (new / "sub" / content.decode()).write_bytes(content)
        atomic.replace_dir(new, final)
        assert [path.name for path in (final / "sub").iterdir()] == [content.decode()]
        assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_failed_replacement_puts_the_former_folder_back(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "former").touch()
    with pytest.raises(FileNotFoundError):
        atomic.replace_dir(tmp_path / "missing", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "former").exists()


def test_sweeping_takes_only_remains_of_the_name(tmp_path):
    (tmp_path / ".a.01234567.tmp").touch()
    (tmp_path / ".a.76543210.tmp").mkdir()
    kept = {".b.01234567.tmp", ".a.tmp", "a", ".a.long-hidden.tmp", "a.01234567.tmp"}
    for name in kept:
        (tmp_path / name).touch()
    assert len(atomic.sweep(tmp_path, "a")) == 2
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_lock_is_held_once_at_a_time_and_its_holder_may_remove_it(tmp_path):
    lock = tmp_path / "new" / ".lock"
    with atomic.held(lock) as first:
        with atomic.held(lock) as second:
            assert (first, second) == (True, False)
        lock.unlink()
        with atomic.held(lock) as third:
            assert third
    with atomic.held(lock) as again:
        assert again


def test_whoever_waited_for_a_lock_that_was_then_removed_has_no_right(tmp_path, monkeypatch):
    """The removal falls between opening and locking."""
    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *words: ((tmp_path / ".lock").unlink(), real(*words)))
    with atomic.held(tmp_path / ".lock") as ours:
        assert not ours


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    refused = pytest.raises(DataError, match=r"\.lock: this file system keeps no locks .*; mount it with them")
    with refused, atomic.held(tmp_path / ".lock"):
        pytest.fail("was held")
