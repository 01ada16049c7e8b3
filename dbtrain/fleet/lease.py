"""Who may write a run's ledger, and where a ledger may lie."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from pathlib import Path

from dbtrain.errors import ConfigError, FleetError

NAME = "ledger.sqlite"
LOCK = "ledger.lock"
WHERE = "ledger.where"
"""In an output folder whose ledger is elsewhere: a file with that folder's path."""
REMOTE = {"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "9p", "ceph", "lustre", "gpfs", "afs", "beegfs", "glusterfs",
          "pvfs2", "wekafs"}  # fmt: skip
"""File systems on which SQLite's locks or shared memory cannot be relied on (sqlite.org/wal.html)."""
LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.bindfs", "fuse.mergerfs", "fuse.gocryptfs", "fuse.encfs", "fuse.lxcfs"}
"""File systems named `fuse.` that are neither a bucket nor another machine's disk."""
LEASE_TRIES = 50
"""Looks, 10 ms apart, at a lease that is held: `is_driven` holds it too, for an instant."""


class Lease:
    """The right to drive a run: a locked file, which the kernel frees the instant its holder is dead."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        for _ in range(LEASE_TRIES):
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
        else:
            holder = os.pread(self.descriptor, 200, 0).decode(errors="replace").strip()
            os.close(self.descriptor)
            raise FleetError(
                f"{folder}: another driver ({holder or 'starting'}) is at work on this run; wait for it, watch it with "
                f"`dbtrain batch status {folder}`, or stop it (SIGTERM) and run the same command again"
            )
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        """Let another driver take over."""
        os.close(self.descriptor)


def is_driven(folder: Path) -> bool:
    """Whether a living driver holds the lease of a run."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def find_ledger(out: Path) -> Path:
    """The folder that holds the ledger of a run's output folder: itself, or the one that it names."""
    where = out / WHERE
    return Path(where.read_text().strip()) if where.exists() else out


def has_ledger(out: Path) -> bool:
    """Whether an output folder's run has a ledger, there or elsewhere."""
    return (find_ledger(out) / NAME).exists()


def ledger_folder(out: Path, asked: Path | None) -> Path:
    """The folder of a run's ledger: the one that the run has, or for a new run the one that is asked for (None is the
    output folder). ConfigError where these differ, FleetError where a run's ledger is not there."""
    known = find_ledger(out)
    begun = (out / WHERE).exists() or (out / NAME).exists()
    folder = asked.resolve() if asked is not None else known
    if begun and folder.resolve() != known.resolve():
        raise ConfigError(
            f"--ledger {asked}: the ledger of {out} is in {known}; give that folder or leave --ledger out. "
            f"To move a ledger, stop the run, move its files and name the new folder in {out / WHERE}"
        )
    if begun and not (folder / NAME).exists():
        raise FleetError(
            f"{folder}: the ledger of {out} is not there, so what became of its subjects is not known; go on where it "
            f"is (another machine's local disk?), put it back, or remove {out / WHERE} to begin a new ledger"
        )
    return folder


def check_local(folder: Path) -> None:
    """Raise FleetError if a ledger in this folder could lose commits."""
    mounts = Path("/proc/self/mounts").read_text("utf-8", "surrogateescape")
    if is_remote(kind := file_system(folder.resolve(), mounts)):
        raise FleetError(
            f"{folder}: is on {kind}, where SQLite can lose commits; give --ledger a folder on a local disk of the "
            "driver's machine (results may stay where they are)"
        )


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that holds an absolute path, by the text of /proc/self/mounts."""
    best = ("", "")
    for line in mounts.splitlines():
        _, place, kind = line.split()[:3]
        place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), place)
        if Path(path).is_relative_to(place) and len(place) >= len(best[0]):
            best = (place, kind)
    return best[1]


def is_remote(kind: str) -> bool:
    """Whether a file system of this type is a network's or a bucket's."""
    return kind in REMOTE or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)
