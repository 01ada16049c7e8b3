"""Files and folders that appear whole or not at all, also across a power cut.

Every writer here takes these steps: write under a temporary name in the same folder, fsync, rename, fsync the folder.
A killed process leaves a hidden `.name.<random>.tmp` behind. No reader opens such a name; `sweep` removes it.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dbtrain.errors import DataError

TEMPORARY = ".tmp"
"""Suffix of everything that is not finished."""
LOCK = ".lock"
"""File whose lock gives a process the sole right to a folder."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of a file system that keeps no locks."""


def write_file(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write `content` to `path`, whole or not at all, and make it survive a power cut.

    content: bytes, or a callable that writes into the open file. If anything fails, `path` is as it was and the
    temporary file is gone.
    """
    path = Path(path)
    temporary = hidden(path)
    try:
        with open(temporary, "xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """An empty folder to fill. After the block it takes the place of `final`; if anything failed, it is removed."""
    temporary = hidden(final)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_dir(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_dir(temporary: Path, final: Path) -> None:
    """Sync the folder `temporary`, then give it the name `final` (on the same file system).

    A former `final` is moved aside to `.final.<random>.tmp` and removed last. A kill between the two renames leaves
    no `final`, never a mixture; the same command makes it again.
    """
    temporary, final = Path(temporary), Path(final)
    sync_tree(temporary)
    aside = None
    if final.exists():
        aside = hidden(final)
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except BaseException:
        if aside is not None:
            os.rename(aside, final)
        raise
    sync_folder(final.parent)
    if aside is not None:
        shutil.rmtree(aside)


def hidden(path: Path) -> Path:
    """A new hidden name beside a path, for a file that is not finished yet, or is to be removed."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")


@contextmanager
def held(lock: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process now holds the lock file; False if another process does. `wait` waits for the lock instead.

    The lock ends with the block, or with the process, even if the process is killed. The file is empty and stays,
    unless its holder removes it; a process that then gets the lock of the removed file holds nothing, and gets False.
    Raises DataError where the file system keeps no locks.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        yield _locked(descriptor, lock, wait) and _names(lock, descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, lock: Path, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise DataError(
            f"{lock}: this file system keeps no locks ({error.strerror}); mount it with them (Lustre: -o flock), or "
            "choose another folder"
        ) from error
    return True


def _names(path: Path, descriptor: int) -> bool:
    """Whether a path is still the name of an open file."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(folder: Path) -> None:
    """Wait until every file and folder below `folder` is on the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(os.path.join(root, name))
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    _sync(folder)


def sweep(folder: Path, name: str | None = None) -> list[Path]:
    """The removed remains of killed writers of `name` (None: of any name). Call this only while nobody writes there."""
    names = [path.name for path in Path(folder).iterdir() if path.name.endswith(TEMPORARY)]
    remains = [Path(folder) / entry for entry in names if is_remains(entry, name or entry[1:].rsplit(".", 2)[0])]
    for path in remains:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return remains


def is_remains(entry: str, name: str) -> bool:
    """Whether `entry` is the temporary name of an unfinished `name`."""
    middle = entry.removeprefix(f".{name}.").removesuffix(TEMPORARY)
    return entry == f".{name}.{middle}{TEMPORARY}" and len(middle) == 8


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
