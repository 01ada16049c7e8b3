"""A run's folder on a machine: whether it is the run's own there, and whether its disk works.

The driver writes a random token into the folder. A machine that lacks the mount has another folder under the same path,
or none, and every error there would be blamed on its subjects.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
from pathlib import Path

from dbtrain.storage.atomic import TEMPORARY, write_file
from dbtrain.storage.trouble import disk_trouble

NAME = "fleet.token"
UNMOUNTED = "is not the run's folder on this machine"


def mark(out: Path) -> str:
    """The token of a run's folder; written if there is none."""
    path = out / NAME
    if not path.exists():
        write_file(path, secrets.token_hex(8).encode())
    return path.read_text(errors="replace")


def is_marked(out: Path) -> bool:
    """Whether this is the folder of a run, as a driver marked it: a machine without the mount has another one."""
    return (out / NAME).exists()


def trouble_of(out: Path, token: str, write: bool = False) -> str | None:
    """What is wrong on this machine with the folder of a run, in one line; None if nothing is.

    token: what `mark` gave; empty: not compared. write: whether to write, sync, read and remove a small file too.
    """
    try:
        if token and (out / NAME).read_text(errors="replace") != token:
            raise FileNotFoundError
        if write:
            _try(out / f".probe.{secrets.token_hex(4)}{TEMPORARY}")
    except OSError as error:
        host = socket.gethostname()
        return disk_trouble(error, paths=False) or f"{out} {UNMOUNTED} ({host}); mount it"
    return None


def cause_of(trouble: str) -> str:
    """The cause (`causes.BLAMED`) of an end by what `trouble_of` says."""
    return "unmounted" if UNMOUNTED in trouble else "disk"


def _try(path: Path) -> None:
    try:
        write_file(path, path.name.encode())
        if path.read_bytes() != path.name.encode():
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
    finally:
        path.unlink(missing_ok=True)
