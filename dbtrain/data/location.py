"""Where shards lie: a folder on this machine, or an address whose scheme the caller allowed. For reading only.

Nothing but plain names inside the place is ever opened. Addresses go through fsspec; chained ones (`a::b`), which could
run other readers, `..` and credentials within them are refused.
"""

import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, cast, get_args

from dbtrain.errors import DataError, shown
from dbtrain.settings.config import Scheme

REMOTE: tuple[str, ...] = get_args(Scheme)
"""Schemes that can be allowed at all: object stores and test doubles; none runs code or asks a web server."""
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9]*://[A-Za-z0-9._/ -]*")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Folder:
    """A folder on this machine. Links, devices and pipes are not followed."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        """The names in the folder."""
        return [entry.name for entry in self.path.iterdir()]

    def open(self, name: str) -> BinaryIO:
        """A regular file of the folder. OSError if it is missing."""
        descriptor = os.open(self.path / _checked(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DataError(f"{name}: is not a regular file")
        return open(descriptor, "rb")


class Address:
    """A folder of an object store."""

    def __init__(self, address: str):
        import fsspec

        try:
            self.files, self.root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise DataError(f"{shown(address)}: cannot be opened ({error}); install what its scheme needs") from error

    def names(self) -> list[str]:
        """The names below the address."""
        return [str(entry).rstrip("/").rpartition("/")[2] for entry in self.files.ls(self.root, detail=False)]

    def open(self, name: str) -> BinaryIO:
        """An object of the store; only the ranges that are read are fetched."""
        return cast(BinaryIO, self.files.open(f"{self.root}/{_checked(name)}", "rb"))


Place = Folder | Address
"""`names()`: what lies there. `open(name)`: a plain file of that very name, for reading; DataError if it is none."""


def place_of(directory: Path | str, schemes: Collection[str] = ()) -> Place:
    """The place that a folder or an address names. A Path is always a folder, whatever its name looks like.

    Raises DataError for an address whose scheme was not allowed.
    """
    if isinstance(directory, Path):
        return Folder(directory)
    text = str(directory)
    match = ADDRESS.match(text)
    if match is None:
        return Folder(Path(directory))
    scheme = match[1].lower()
    if scheme not in REMOTE or scheme not in schemes:
        offered = f", or allow its scheme ({', '.join(REMOTE)})" if scheme in REMOTE else ""
        raise DataError(f"{shown(text)}: is an address; give a folder on this machine{offered}")
    if not PLAIN.fullmatch(text) or ".." in text.split("/"):
        raise DataError(f"{shown(text)}: is no plain address; write SCHEME://NAME/NAME without `..`, `::` or `@`")
    return Address(text)


def _checked(name: str) -> str:
    if not NAME.fullmatch(name) or ".." in name:
        raise DataError(f"{shown(name)}: is no plain file name")
    return name
