"""A fleet as a user starts it: a small job, `dbtrain batch run` as a process, and a look at what it left."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil

from dbtrain.fleet.ledger import Ledger
from dbtrain.fleet.processes import born
from dbtrain.values import Subject
from tests.kit.main_job import ROOT, environment, heed_ctrl_c, inside, write_job

SMALL = ["data.resolution=16", "train.steps=2", "train.batch=1", "lora.rank=1", "prior.images=2", "prior.steps=1",
         "sample.images=0"]  # fmt: skip
LORA = "pytorch_lora_weights.safetensors"
RESULT = {"run": "r", "files": {"a": "d"}, "seconds": 2.0, "gpu_seconds": 3.0, "stages_s": {"train": 2.0}}
WAITS = {"state": "waiting", "failures": 1, "losses": 0, "pack": None, "cause": "crash", "reason": "died of SIGABRT"}
"""A result and an end of an attempt, as a ledger takes them."""


def write_small(folder: Path, subjects: str, *overrides: str) -> list[str]:
    """The words of `batch run` for a small job, but for `--out`."""
    return [*write_job(folder, *SMALL, *overrides, subjects=subjects), "--workers", "2", "--hang", "20"]


def start(words: list[str], out: Path, *more: str, poison: bool = False, **variables: str) -> subprocess.Popen:
    """`dbtrain batch run` on its own; what it says goes to OUT.err."""
    paths = [*([str(ROOT / "tests/fleet/poison")] if poison else []), environment()["PYTHONPATH"]]
    surroundings = {**environment(), "PYTHONPATH": os.pathsep.join(paths), **variables}
    command = [sys.executable, "-m", "dbtrain", "batch", "run", *map(str, words), "--out", str(out), *map(str, more)]
    with open(f"{out}.err", "ab") as log:
        return subprocess.Popen(
            command, env=surroundings, stdout=log, stderr=log, start_new_session=True, preexec_fn=heed_ctrl_c
        )


def batch(*words: object) -> SimpleNamespace:
    """`dbtrain batch WORDS` to its end, in this process: returncode, stdout, stderr. It must start no Ray."""
    done = inside(["batch", *words])
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
    return SimpleNamespace(returncode=done.exit_code, stdout=done.stdout, stderr=done.stderr)


def said(out: Path) -> str:
    """All that the drivers of a run said."""
    return Path(f"{out}.err").read_text()


def finish(driver: subprocess.Popen, out: Path, code: int = 0) -> None:
    """Wait for a driver's end and see that it leaves as it should, alone."""
    try:
        assert driver.wait(240) == code, said(out)[-3000:]
    finally:
        driver.kill()
    assert "Traceback" not in said(out), said(out)


def ask(out: Path, question: str) -> list[tuple]:
    """Rows of the ledger, read beside the driver."""
    try:
        with sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True, timeout=5) as db:
            return db.execute(question).fetchall()
    except sqlite3.OperationalError:
        return []


def states(out: Path) -> dict[str, str]:
    """State of every subject."""
    return dict(ask(out, "SELECT id, state FROM subjects"))


def wait_for(condition, driver: subprocess.Popen, out: Path, seconds: float = 120):
    """The first true value of a condition; fails if the driver ends or the time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        assert driver.poll() is None, said(out)[-3000:]
        time.sleep(0.02)
    raise AssertionError(f"never came: {said(out)[-2000:]}")


def descendants(pid: int) -> dict[int, int]:
    """The living processes below another, each with its parent."""
    parents = {}
    with suppress(psutil.NoSuchProcess):
        for below in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if below.status() != psutil.STATUS_ZOMBIE:
                    parents[below.pid] = below.ppid()
    return parents


def processes(driver: int) -> dict[str, list[int]]:
    """Processes below a driver by kind: the machine's warm parent (`host`), its forks for workers, theirs, actors."""
    below = descendants(driver)
    names = {pid: command(pid) for pid in below}
    warm = {pid for pid, name in names.items() if b"fleet.warm_parent" in name}
    hosts = [pid for pid in warm if below[pid] not in warm]
    parents = [pid for pid in warm if below[pid] in hosts]
    return {
        "host": hosts,
        "warm parent": parents,
        "trainer": [pid for pid, parent in below.items() if parent in parents],
        "actor": [pid for pid, name in names.items() if name.startswith(b"ray::Actor")],
        "all": list(below),
    }


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def survivors(pids: dict[int, str], seconds: float = 5.0) -> list[bytes]:
    """Command lines of processes (pid and birth) that are still there after so long."""
    end = time.monotonic() + seconds
    left = list(pids)
    while left and time.monotonic() < end:
        left = [pid for pid in left if pids[pid] and born(pid) == pids[pid]]
        time.sleep(0.05)
    return [command(pid) for pid in left]


def digests(out: Path) -> dict[str, str]:
    """The adapter's digest of every finished subject, by its record."""
    return {
        path.parent.name: json.loads(path.read_text())["files"][LORA] for path in out.glob("subjects/*/record.json")
    }


@contextmanager
def run_of_dogs(folder, subjects, skipped=None):
    """The ledger of a new run of so many dogs, s0 and on, which all wait."""
    ledger = Ledger(folder, create=True)
    with ledger.commit():
        about = dict.fromkeys(("config", "config_digest", "manifest", "manifest_digest"), "")
        ledger.create_run(about, [Subject(f"s{number}", "dog", ()) for number in range(subjects)], skipped)
    yield ledger
    ledger.close()
