"""Damage to files at rest, and disks and users that refuse: what storage, accidents and permissions do."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SECTOR = 512


def flip(path: Path, chance: random.Random) -> str:
    """One bit turned over."""
    content = bytearray(path.read_bytes())
    place, bit = chance.randrange(len(content)), chance.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place}"


def truncate(path: Path, chance: random.Random) -> str:
    """Cut somewhere before the end."""
    size = chance.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"cut at {size}"


def zero_sector(path: Path, chance: random.Random) -> str:
    """One sector read as zeros; one that held zeros only is not chosen."""
    content = bytearray(path.read_bytes())
    sectors = [at for at in range(0, len(content), SECTOR) if any(content[at : at + SECTOR])]
    start = chance.choice(sectors)
    content[start : start + SECTOR] = bytes(len(content[start : start + SECTOR]))
    path.write_bytes(content)
    return f"sector {start // SECTOR} zeroed"


DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "flip": flip,
    "truncate": truncate,
    "zero_sector": zero_sector,
}


@contextmanager
def small_disk(folder: Path, size: str = "256k") -> Iterator[Path]:
    """A file system of its own and of this size at `folder`; raises PermissionError where that takes more rights."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """The folder mounted on itself for reading only; raises PermissionError where that takes more rights."""
    for words in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise PermissionError(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def as_nobody(command: list[str]) -> list[str]:
    """A command as it is run by an ordinary user, whom permissions bind; root needs this, others are one already."""
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command] if os.getuid() == 0 else command
