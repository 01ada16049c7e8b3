"""Whose fault a refused file is: a run's folder proves that it is the run's own on a machine, and that its disk works.

The driver leaves a random token there. A machine that lacks the mount has another folder under the same path, or none,
and everything that goes wrong there would look like its subjects' doing.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
from pathlib import Path

from dbtrain.atomic import TEMPORARY, write_file
from dbtrain.errors import disk_trouble, is_of_one_file

NAME = "fleet.token"


def mark(out: Path) -> str:
    """The token of a run's folder, which gets one if it has none."""
    path = out / NAME
    if not path.exists():
        write_file(path, secrets.token_hex(8).encode())
    return path.read_text(errors="replace")


def refusal(error: BaseException) -> tuple[str, str] | None:
    """(cause, reason) of an error that comes from what the file system refused; else None. `file` is what may be the
    trouble of one file, `disk` what is that of a whole disk, share or machine."""
    trouble = disk_trouble(error, paths=False)
    return ("file" if is_of_one_file(error) else "disk", trouble) if trouble else None


def trouble_of(out: Path, token: str, write: bool = False) -> str | None:
    """What is wrong on this machine with the folder of the run that has a token, in one line; None if nothing is.

    write: whether a small file must also be written, synced, read back and removed. An empty token is not asked for.
    """
    try:
        if token and (out / NAME).read_text(errors="replace") != token:
            raise FileNotFoundError
        if write:
            _try(out / f".probe.{secrets.token_hex(4)}{TEMPORARY}")
    except OSError as error:
        host = socket.gethostname()
        return disk_trouble(error, paths=False) or f"{out} is not the run's folder on this machine ({host}); mount it"
    return None


def _try(path: Path) -> None:
    try:
        write_file(path, path.name.encode())
        if path.read_bytes() != path.name.encode():
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
    finally:
        path.unlink(missing_ok=True)
