"""The ledger by itself: compare-and-set, take-over, requests, what others may read, and where it may lie."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError

from dbtrain.errors import ConfigError, DataError, EngineError, FleetError, StopRequested
from dbtrain.fleet.export import write_rows
from dbtrain.fleet.inbox import request, take_requests
from dbtrain.fleet.ledger import VERSION, Lease, Ledger, file_system, find_ledger, is_driven, is_remote
from dbtrain.fleet.processes import born, descendants, holders
from dbtrain.fleet.status import Screen, read_rows, summarize_run, table
from dbtrain.fleet.trainer import Charges, explain
from dbtrain.fleet.worker import Worker
from dbtrain.results.record import NEEDED
from dbtrain.storage.trouble import bare

RESULT = {"run": "r", "files": {"a": "d"}, "seconds": 2.0, "gpu_seconds": 3.0, "stages_s": {"train": 2.0}}
WAITS = {"state": "waiting", "failures": 1, "losses": 0, "pack": None, "cause": "crash", "reason": "died of SIGABRT"}


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path, create=True)
    with opened.commit():
        about = {"config": "{}", "config_digest": "c", "manifest": "m", "manifest_digest": "d"}
        specs = [{"id": f"s{number}", "class_noun": "dog"} for number in range(5)]
        opened.create_run(about, specs, {"bad": "no photo"})
    yield opened
    opened.close()


def state(ledger, position):
    return ledger.row(position)["state"]


def test_a_subject_finishes_once_and_late_words_change_nothing(ledger):
    with ledger.commit():
        first = ledger.start(1, [0], "w1")[0]
        assert ledger.fail(0, first, WAITS)
        second = ledger.start(2, [0], "w2")[0]
        assert (first, second) == (1, 2)
        assert not ledger.finish(0, first, RESULT)
        assert not ledger.fail(0, first, WAITS)
        assert state(ledger, 0) == "running"
        assert ledger.finish(0, second, RESULT)
        assert not ledger.finish(0, second, RESULT)
    assert state(ledger, 0) == "finished"
    ends = ledger.db.execute("SELECT attempt, outcome, cause FROM attempts ORDER BY 1").fetchall()
    assert [tuple(row) for row in ends] == [(1, "waiting", "crash"), (2, "finished", None)]


def test_only_waiting_subjects_are_given_out_and_a_refused_unit_changes_nothing(ledger):
    with ledger.commit():
        ledger.start(1, [0], "w1")
    with pytest.raises(FleetError, match="number 0 was given out while it was not waiting"), ledger.commit():
        ledger.start(2, [1, 0], "w2")
    assert (state(ledger, 0), state(ledger, 1)) == ("running", "waiting")


def test_a_dead_drivers_subjects_wait_again_without_blame(ledger):
    with ledger.commit():
        ledger.start(1, [0, 1], "w1")
        assert ledger.take_over() == 2
    row = ledger.row(0)
    assert (row["state"], row["attempts"], row["failures"], row["losses"]) == ("waiting", 1, 0, 0)
    assert summarize_run_of(ledger)["retries"] == {"driver": 2}


def summarize_run_of(ledger):
    from dbtrain.fleet.status import summarize

    return summarize(ledger)


def test_commits_survive_a_kill_at_once(tmp_path):
    """A child commits one row after another and is killed; every row that it reported is there."""
    Ledger(tmp_path, create=True).close()
    code = (
        "import sys; from pathlib import Path; from dbtrain.fleet.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "for n in range(10**6):\n"
        "    with ledger.commit(): ledger.note_spent('prior', str(n), 'w', 1.0, 'done', '')\n"
        "    print(n, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    told = [int(child.stdout.readline()) for _ in range(20)]
    child.kill()
    told += [int(line) for line in child.stdout.read().splitlines()]
    child.wait()
    kept = {int(row[0]) for row in Ledger(tmp_path).db.execute("SELECT class FROM spent")}
    assert set(told) <= kept and len(kept) - len(told) <= 1


def test_a_disk_that_takes_no_more_is_told_and_nothing_is_half_done(ledger):
    ledger.db.execute("PRAGMA max_page_count=1")

    def overfill():
        with ledger.commit():
            for size in (1, 10**6):
                ledger.note_spent("prior", "x" * size, "w", 1.0, "done", "")

    with pytest.raises(FleetError, match="cannot be written .*full.*; free disk space"):
        overfill()
    assert ledger.db.execute("SELECT count(*) FROM spent").fetchone()[0] == 0


def test_requests_apply_now_or_wait_for_the_driver(ledger, tmp_path):
    assert request(tmp_path, "cancel", ["s1", "s2"]) == 2
    assert request(tmp_path, "cancel", ["s1"]) == 0
    assert request(tmp_path, "retry", None) == 2
    with pytest.raises(DataError, match="no subject 'zebra'"):
        request(tmp_path, "retry", ["zebra"])
    lease = Lease(tmp_path)
    assert request(tmp_path, "cancel", ["s3"]) is None
    (letter,) = (tmp_path / "requests").iterdir()
    twice = letter.read_bytes()
    assert take_requests(ledger, tmp_path) == [("cancel", [(3, "dog")])]
    assert take_requests(ledger, tmp_path) == [], "a request is taken once"
    letter.write_bytes(twice)  # a driver was killed between its commit and the removal
    assert take_requests(ledger, tmp_path) == [("cancel", [])]
    lease.release()


def test_a_look_at_a_lease_keeps_nobody_from_it(tmp_path):
    """Many look whether a run is driven while drivers come and go; each look holds the lock for an instant."""
    Lease(tmp_path).release()
    code = (
        "import sys; from pathlib import Path; from dbtrain.fleet.ledger import is_driven\n"
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


def test_what_is_asked_for_finished_subjects_is_kept_by_name_and_settings(ledger, tmp_path):
    quick, thorough = {"generate": "", "evaluate": "quick"}, {"evaluate": "thorough"}
    with ledger.commit():
        ledger.start(1, [0, 3], "w1")
        ledger.finish(0, 1, RESULT), ledger.finish(3, 1, RESULT)
        assert [row[0::2] for row in ledger.open_after(quick)] == [
            (0, "generate"), (0, "evaluate"), (3, "generate"), (3, "evaluate"),
        ]  # fmt: skip
        ledger.note_after(0, "generate", "", "done")
        ledger.note_after(0, "evaluate", "quick", "done")
        ledger.note_after(3, "evaluate", "quick", "IndexError: x")
        assert ledger.open_after(quick) == [(3, "dog", "generate")]
        assert [row[0] for row in ledger.open_after(thorough)] == [0, 3]
        ledger.retry_after(quick)
        assert ledger.open_after(quick) == [(3, "dog", "generate"), (3, "dog", "evaluate")]
    assert summarize_run(tmp_path)["after"] == {
        "evaluate": {"done": 1, "failed": 0}, "generate": {"done": 1, "failed": 0},
    }  # fmt: skip
    assert read_rows(tmp_path)[0]["after"] == {"generate": "done", "evaluate": "done"}


def test_reasons_are_words_and_no_markup_and_a_table_begins_with_the_first_summary(ledger, tmp_path, capsys):
    from rich.console import Console

    with ledger.commit():
        ledger.start(1, [0], "w1")
        ledger.fail(0, 1, {**WAITS, "state": "quarantined", "reason": "RuntimeError: [/pytorch/x] closed [bold"})
    with open(os.devnull, "w") as nowhere:
        console = Console(width=140, record=True, file=nowhere)
        console.print(table(summarize_run(tmp_path)))
    assert "RuntimeError: [/pytorch/x] closed [bold" in console.export_text()

    screen = Screen(tmp_path, quiet=False)
    assert screen.live is None
    screen.say("[/x] waits")
    screen.close(summarize_run(tmp_path))
    assert capsys.readouterr().err == "[/x] waits\n"


def test_rows_summary_and_tables_of_a_run(ledger, tmp_path):
    with ledger.commit():
        ledger.start(1, [0, 1], "w1")
        ledger.finish(0, 1, RESULT)
        ledger.fail(1, 1, {**WAITS, "state": "quarantined"})
    rows = {row["subject"]: row for row in read_rows(tmp_path)}
    assert (rows["s0"]["state"], rows["s0"]["stages_s"], rows["s0"]["attempts"]) == ("finished", {"train": 2.0}, 1)
    assert (rows["s1"]["cause"], rows["s1"]["reason"]) == ("crash", "died of SIGABRT")
    assert (rows["bad"]["state"], rows["bad"]["reason"]) == ("skipped", "no photo")
    summary = summarize_run(tmp_path)
    assert summary["subjects"] == {
        "waiting": 3, "running": 0, "finished": 1, "quarantined": 1, "cancelled": 0, "skipped": 1,
    }  # fmt: skip
    assert summary["gpu_seconds"]["train"] == 3.0 and summary["retries"] == {"crash": 1}
    assert write_rows(tmp_path, tmp_path / "t.csv") == 6
    with pytest.raises(ConfigError, match="ends in .txt, want .parquet or .csv"):
        write_rows(tmp_path, tmp_path / "t.txt")


def test_a_folder_without_a_run_is_an_error_and_is_left_empty(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        summarize_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_of_another_format_is_refused(tmp_path):
    sqlite3.connect(tmp_path / "ledger.sqlite").executescript("PRAGMA user_version=7").close()
    with pytest.raises(DataError, match=f"has format 7, this dbtrain knows {VERSION}"):
        Ledger(tmp_path)


def test_a_ledger_may_lie_elsewhere(tmp_path):
    (tmp_path / "ledger.where").write_text(str(tmp_path / "local") + "\n")
    assert find_ledger(tmp_path) == tmp_path / "local"


MOUNTS = (
    "/dev/sda / ext4 rw 0 0\nserver:/x /data nfs4 rw 0 0\n/dev/sdb /data/my\\040disk xfs rw 0 0\n"
    "//s/x /data/Größe cifs rw 0 0\n"
)


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
    monkeypatch.setattr("dbtrain.fleet.ledger.file_system", lambda *_: "nfs4")
    with pytest.raises(FleetError, match="is on nfs4.*give --ledger"):
        Ledger(tmp_path, create=True)


def test_charges_sum_to_the_time_that_passed():
    for slots in (1, 2, 3):
        begin = time.monotonic()
        charges = Charges(["a", "b", "c"], slots)
        costs = []
        for name in ("b", "a", "c"):
            time.sleep(0.02)
            costs.append(charges.end(name))
        assert sum(costs) == pytest.approx(time.monotonic() - begin, abs=0.005)
        assert slots > 1 or costs[0] == 0.0


def caused(error, by):
    error.__cause__ = by
    return error


@pytest.mark.parametrize("error, cause", [
    (torch.OutOfMemoryError(), "oom"),
    (MemoryError(), "oom"), (RuntimeError("CUDA out of memory. Tried"), "oom"), (OSError(28, "No space left"), "disk"),
    (DataError("bad shard"), "error"), (KeyError("x"), "error"),
    (OSError(5, "Input/output error"), "file"), (OSError(116, "Stale file handle", "a"), "disk"),
    (PermissionError(13, "Permission denied", "a"), "file"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk"),
    (caused(DataError("shard cannot be read"), OSError(5, "Input/output error")), "file"),
    (bare(caused(DataError("shard cannot be read"), OSError(116, "Stale file handle"))), "disk"),
    (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), "disk"),
    (FileNotFoundError(2, "No such file or directory", "a"), "error"),
    (caused(DataError("no shard"), FileNotFoundError(2, "No such file or directory", "a")), "error"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6044."), "lost"),
    (ConnectionResetError(104, "Connection reset by peer"), "lost"),
    (StopRequested("stopped on request"), "stopped"),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA"), "device"),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), "device"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), "device"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "device"),
    (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), "device"),
    (torch.AcceleratorError("the device went away"), "device"),
    (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.27.5"), "lost"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
    (RuntimeError("CUDA error: out of memory"), "oom"),
    (torch.AcceleratorError("CUDA error: device-side assert triggered"), "error"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"), "error"),
    (EngineError("model.attention: flash: CUDA error"), "error"),
])  # fmt: skip
def test_causes_of_errors(error, cause):
    assert explain(error)[0] == cause


def test_a_published_file_that_the_disk_does_not_give_back_is_no_damaged_one(tmp_path):
    """/proc/self/mem gives EIO to whoever reads its first byte."""
    (tmp_path / "subjects" / "a").mkdir(parents=True)
    (tmp_path / "subjects" / "a" / "w").symlink_to("/proc/self/mem")
    record = {**dict.fromkeys(NEEDED, "a"), "files": {"w": "0"}}
    (tmp_path / "subjects" / "a" / "record.json").write_text(json.dumps(record))
    told = Worker("w", str(tmp_path), 20)._checked(1, 0, "a", 1.0)
    assert told[:4] == ("failed", 1, 0, "file") and "the disk or network share failed" in told[4]
    (tmp_path / "subjects" / "a" / "w").unlink()
    assert Worker("w", str(tmp_path), 20)._checked(1, 0, "a", 1.0)[3] == "error"


def test_a_guard_kills_what_outlives_its_driver(tmp_path):
    """A driver that starts a process which ignores everything, has it watched, and is killed."""
    (tmp_path / "scratch").mkdir()
    code = (
        "import subprocess, sys, time; from pathlib import Path; from dbtrain.fleet.processes import *\n"
        "guard = start_guard(Path(sys.argv[1]))\n"
        "log = open(sys.argv[1] + '/log', 'w')\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True, stdout=log)\n"
        "print(child.pid, guard.pid, flush=True); time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "scratch")]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child, guard = map(int, driver.stdout.readline().split())
    starts = {pid: born(pid) for pid in (child, guard)}
    assert set(descendants(driver.pid)) == {child, guard}
    driver.kill()
    driver.wait()
    end = time.monotonic() + 5
    while time.monotonic() < end and any(born(pid) == start for pid, start in starts.items()):
        time.sleep(0.02)
    assert all(born(pid) != start or zombie(pid) for pid, start in starts.items())
    assert not (tmp_path / "scratch").exists()


def zombie(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


def test_only_users_of_a_folder_are_its_holders(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "ab").mkdir()
    with open(tmp_path / "ab" / "file", "w"):
        assert holders(tmp_path / "a") == []
        assert os.getpid() in holders(tmp_path / "ab")


def test_specs_hold_what_training_needs():
    from dbtrain.fleet.prepare import spec_of
    from dbtrain.fleet.trainer import to_subject
    from dbtrain.values import Subject

    subject = Subject("a", "dog", (), caption="c", seed=3, steps=7, lr=0.1, rank=2, prior_weight=0.5)
    spec = json.loads(json.dumps(spec_of(subject, "sks")))
    assert spec["identifier"] == "sks" and to_subject(spec) == subject
