"""Who may write a ledger, and where it may lie."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dbtrain.errors import FleetError
from dbtrain.fleet.lease import Lease, file_system, find_ledger, is_driven, is_remote
from dbtrain.fleet.ledger import Ledger

MOUNTS = (
    "/dev/sda / ext4 rw 0 0\nserver:/x /data nfs4 rw 0 0\n/dev/sdb /data/my\\040disk xfs rw 0 0\n"
    "//s/x /data/Größe cifs rw 0 0\n"
)


def test_a_look_at_a_lease_keeps_nobody_from_it(tmp_path):
    """Many look whether a run is driven while drivers come and go; each look holds the lock for an instant."""
    Lease(tmp_path).release()
    code = (
        "import sys; from pathlib import Path; from dbtrain.fleet.lease import is_driven\n"
        "print(1, flush=True)\n"
        "while True: is_driven(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    lookers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for looker in lookers:
            looker.stdout.readline()
        for _ in range(300):
            Lease(tmp_path).release()
    finally:
        for looker in lookers:
            looker.kill()
            looker.wait()
    assert not is_driven(tmp_path)


def test_a_lease_is_held_by_one_and_freed_by_death(tmp_path):
    lease = Lease(tmp_path)
    with pytest.raises(FleetError, match="another driver"):
        Lease(tmp_path)
    lease.release()
    child = os.fork()
    if child == 0:
        Lease(tmp_path)
        signal.pause()
    while not (tmp_path / "ledger.lock").read_text().startswith(f"pid {child} "):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    Lease(tmp_path).release()


def test_a_ledger_may_lie_elsewhere(tmp_path):
    (tmp_path / "ledger.where").write_text(str(tmp_path / "local") + "\n")
    assert find_ledger(tmp_path) == tmp_path / "local"


@pytest.mark.parametrize("path, kind", [
    ("/srv/a", "ext4"), ("/data/runs", "nfs4"), ("/database", "ext4"), ("/data/my disk/run", "xfs"),
    ("/data/Größe/run", "cifs"),
])  # fmt: skip
def test_the_file_system_of_a_path(path, kind):
    assert file_system(path, MOUNTS) == kind


@pytest.mark.parametrize("kind, remote", [
    ("ext4", False), ("overlay", False), ("fuseblk", False), ("fuse.fuse-overlayfs", False), ("nfs4", True),
    ("fuse.gcsfuse", True), ("fuse.rclone", True), ("fuse.sshfs", True), ("beegfs", True),
])  # fmt: skip
def test_buckets_and_other_machines_disks_are_remote(kind, remote):
    assert is_remote(kind) is remote


def test_a_remote_file_system_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("dbtrain.fleet.lease.file_system", lambda *_: "nfs4")
    with pytest.raises(FleetError, match="is on nfs4.*give --ledger"):
        Ledger(tmp_path, create=True)
