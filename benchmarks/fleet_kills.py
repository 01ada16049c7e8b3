"""Kills by a seeded plan while a fleet works, and an audit of what it left; `benchmarks/fleet.py kills` runs this."""

import os
import random
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

from dbtrain.fleet.processes import born as start_of
from dbtrain.storage.atomic import file_digest
from tests.kit.fleet_run import descendants, processes

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = {"trainer": 80, "warm parent": 6, "actor": 6, "driver": 4, "host": 2}
"""How often each kind of process is chosen, relative to the others; what is not there then is not chosen. `host` is the
machine's warm parent, which forks those of the workers."""
LOG = re.compile(r".*/logs/(worker-(\d+))(-\d+)?\.log")
"""What a warm parent and its trainers write to: (worker, its number, its place in a gang)."""


def environment() -> dict[str, str]:
    """A user's environment for a checkout, one thread a process."""
    roots = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "launchers"))
    return {**os.environ, "PYTHONPATH": roots, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start_driver(job: tuple[Path, Path], out: Path, words: list[str]) -> subprocess.Popen:
    """`dbtrain batch run` as a process of its own; what it says is appended to OUT.log."""
    command = [sys.executable, "-m", "dbtrain", "batch", "run", str(job[0]), "--config", str(job[1]), "--out", str(out)]
    with open(f"{out}.log", "ab") as log:
        return subprocess.Popen([*command, *words], env=environment(), stdout=log, stderr=log, start_new_session=True)


def processes_of(driver: int) -> dict[str, list[int]]:
    """The living processes of a run by kind: driver, actor, host, warm parent, trainer, and all the others as `ray`."""
    below, found = processes(driver), {"driver": [driver]}
    found |= {kind: below[kind] for kind in ("actor", "host", "warm parent", "trainer")}
    known = {pid for pids in found.values() for pid in pids}
    return {**found, "ray": [pid for pid in below["all"] if pid not in known]}


def command_of(pid: int) -> bytes:
    """A process's command line; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def worker_of(pid: int) -> re.Match | None:
    """The worker that a process belongs to, by the log that it or what is below it writes; None if none does yet."""
    for one in (pid, *descendants(pid)):
        try:
            found = LOG.fullmatch(os.readlink(f"/proc/{one}/fd/1"))
        except OSError:
            continue
        if found:
            return found
    return None


@dataclass
class Kill:
    """A kill that waits for its answer: the next attempt of the worker that was hit or, where that is gone (None), of a
    worker with a higher number than any had. Workers' numbers begin anew with each driver."""

    kind: str
    time: float
    driver: int
    worker: str | None
    highest: int


class Campaign:
    """Kills by a seeded plan while a run goes on."""

    def __init__(self, job: tuple[Path, Path], out: Path, words: list[str], seed: int, kills: int, pause_s: float,
                 gang: int = 1):  # fmt: skip
        self.job, self.out, self.words, self.kills, self.pause_s = job, out, words, kills, pause_s
        self.names = {"trainer": "gang member"} if gang > 1 else {}
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.overtaken: Counter[str] = Counter()
        self.drivers = self.first_instant = self.with_a_checkpoint = 0
        self.recovery_s: dict[str, list[float]] = {}
        self.survivors: list[str] = []
        self.waiting: deque[Kill] = deque()
        self.below: deque[tuple[float, int, str, str]] = deque()
        self.driver_mib: list[float] = []

    def run(self) -> float:
        """Seconds until the run is complete."""
        begin = time.monotonic()
        driver = start_driver(self.job, self.out, self.words)
        while driver.poll() is None:
            if sum(self.done.values()) < self.kills:
                driver = self.strike(driver)
            else:
                time.sleep(0.1)
            self.note_recovery()
            self.note_survivors()
            self.driver_mib.append(resident_mib(driver.pid))
        if driver.returncode:
            raise SystemExit(f"the run ended with {driver.returncode}; see {self.out}.log")
        self.note_recovery()
        return time.monotonic() - begin

    def strike(self, driver: subprocess.Popen) -> subprocess.Popen:
        """One kill after a random pause; the driver that goes on."""
        kinds = list(WEIGHTS)
        kind = self.random.choices(kinds, [WEIGHTS[one] for one in kinds])[0]
        instant = self.random.random() < 0.25
        known = set(processes_of(driver.pid)[kind])
        if instant and kind != "driver":
            victim = self.fresh(driver, kind, known)
        else:
            time.sleep(self.random.uniform(0, 2 * self.pause_s))
            there = processes_of(driver.pid)[kind] if driver.poll() is None else []
            victim = self.random.choice(there) if there else None
        if victim is None or driver.poll() is not None:
            return driver
        if kind == "driver":
            if instant:
                driver = self.kill_driver(driver, self.random.uniform(0, 3))
                self.first_instant += 1
            return self.kill_driver(driver)
        self.kill(driver, victim, kind)
        self.first_instant += instant
        return driver

    def fresh(self, driver: subprocess.Popen, kind: str, known: set[int]) -> int | None:
        """A process of a kind in its first instant; if none appears by itself, one is made to by killing an old one."""
        for look in range(400):
            there = processes_of(driver.pid)[kind]
            new = [pid for pid in there if pid not in known]
            if new:
                return new[0]
            if there and sum(self.done.values()) + 1 < self.kills and look == 50:
                self.kill(driver, self.random.choice(there), kind)
            time.sleep(0.01)
        return None

    def kill(self, driver: subprocess.Popen, pid: int, kind: str) -> None:
        """SIGKILL, and a note of when."""
        numbers = [found for one in processes_of(driver.pid)["warm parent"] if (found := worker_of(one))]
        hit = worker_of(pid)
        left = kind != "host"  # what a machine's warm parent has forked lives on, and works on
        below = [(one, start_of(one), command_of(one)) for one in descendants(pid) if left]
        resumable = self.resumable(hit[1]) if hit else 0
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.below.extend(
            (time.time(), one, born, f"{kind} {line[:60].decode(errors='replace')}") for one, born, line in below
        )
        self.done[self.names.get(kind, kind)] += 1
        self.with_a_checkpoint += resumable
        if not left:
            return
        highest = max((int(found[2]) for found in numbers), default=0)
        self.waiting.append(
            Kill(kind, time.time(), self.drivers, hit[1] if hit and kind != "actor" else None, highest)
        )

    def resumable(self, worker: str) -> int:
        """How many subjects a worker is training that have a checkpoint to go on from."""
        ids = [row[0] for row in ask(self.out, "SELECT id FROM subjects WHERE state='running' AND worker=?", worker)]
        return sum(any((self.out / "subjects" / name / "checkpoints").glob("step-*")) for name in ids)

    def kill_driver(self, driver: subprocess.Popen, look_s: float = 5.0) -> subprocess.Popen:
        """SIGKILL the driver, start it again at once, and look for survivors after 5 s, if there is that much time."""
        if driver.poll() is not None:
            return driver
        self.note_recovery()
        below = [pid for group in processes_of(driver.pid).values() for pid in group if pid != driver.pid]
        born = {pid: start_of(pid) for pid in below}
        driver.kill()
        driver.wait()
        killed = time.time()
        self.done["driver"] += 1
        self.drivers += 1
        self.waiting.append(Kill("driver", killed, self.drivers, None, 0))
        fresh = start_driver(self.job, self.out, self.words)
        time.sleep(look_s - min(look_s, time.time() - killed))
        if look_s < 5:
            return fresh
        self.survivors += [command_of(pid).decode()[:80] for pid in below if born[pid] and start_of(pid) == born[pid]]
        return fresh

    def note_survivors(self) -> None:
        """What stood below a killed process and still lives 5 s later."""
        while self.below and time.time() - self.below[0][0] > 5:
            _, pid, born, what = self.below.popleft()
            if born and start_of(pid) == born:
                self.survivors.append(what)

    def note_recovery(self) -> None:
        """Time from each kill to its answer. One that a kill of the driver overtook before has none of its own."""
        for kill in list(self.waiting):
            name = self.names.get(kill.kind, kill.kind)
            if kill.driver != self.drivers:
                self.overtaken[name] += 1
                self.waiting.remove(kill)
                continue
            same = "worker = ?" if kill.worker else "CAST(substr(worker, 8) AS INTEGER) > ?"
            question = f"SELECT min(started) FROM attempts WHERE started > ? AND {same}"
            after = ask(self.out, question, kill.time, kill.worker or kill.highest)
            if after and after[0][0] is not None:
                self.recovery_s.setdefault(name, []).append(after[0][0] - kill.time)
                self.waiting.remove(kill)

    def recovery(self) -> dict[str, dict[str, float]]:
        """By kind: kills, those answered and how soon, those that the driver's next death overtook, and those that no
        work was left for."""
        left = Counter(self.names.get(kill.kind, kill.kind) for kill in self.waiting)
        return {
            kind: {"kills": number, "answered": len(self.recovery_s.get(kind, ())), "overtaken": self.overtaken[kind],
                   "unanswered": left[kind], **quantiles(self.recovery_s.get(kind, []))}
            for kind, number in self.done.items()
        }  # fmt: skip


def resident_mib(pid: int) -> float:
    """Memory of a process, in MiB; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


def ask(out: Path, question: str, *values: object) -> list[tuple]:
    """Rows of a run's ledger, read beside its driver."""
    try:
        with sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True, timeout=5) as db:
            return db.execute(question, values).fetchall()
    except sqlite3.OperationalError:
        return []


def audit(out: Path, calm: Path, subjects: int) -> dict:
    """What the ledger and the disk say after a run, beside the undisturbed one."""
    states = dict(ask(out, "SELECT state, count(*) FROM subjects GROUP BY state"))
    twice = ask(out, "SELECT count(*) FROM (SELECT position FROM attempts WHERE outcome='finished' "
                     "GROUP BY position HAVING count(*) != 1)")[0][0]  # fmt: skip
    files = {where: dict(ask(where, "SELECT id, files FROM subjects WHERE state='finished'")) for where in (out, calm)}
    differ = [name for name, digests in files[calm].items() if files[out].get(name) != digests]
    ours, theirs = adapters(out), adapters(calm)
    remains = sum(1 for path in (out / "subjects").rglob(".*.tmp"))
    attempts = dict(ask(out, "SELECT coalesce(cause, outcome), count(*) FROM attempts GROUP BY 1"))
    trained = [count_lines(out / "subjects" / name / "log.jsonl") for name in files[out]]
    return {
        "states": states,
        "lost": subjects - sum(states.get(state, 0) for state in ("finished", "quarantined")),
        "duplicated": twice,
        "blamed": ask(out, "SELECT coalesce(sum(failures), 0) FROM subjects")[0][0],
        "digests_that_differ": len(differ),
        "adapters_read_from_disk": len(ours),
        "adapters_that_differ": sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys()),
        "attempts_by_end": attempts,
        "temporary_files_left": remains,
        "trained_to_the_end_more_than_once": sum(lines > 1 for lines in trained),
    }


def adapters(out: Path) -> dict[str, str]:
    """The digest of every weights file under `subjects/`, read from the disk, by its path."""
    home = out / "subjects"
    return {str(path.relative_to(home)): file_digest(path) for path in home.glob("*/*.safetensors")}


def count_lines(path: Path) -> int:
    """Log lines of a subject's last step: how often it was trained to the end."""
    return sum(1 for _ in path.open()) if path.exists() else 0


def quantiles(values: list[float]) -> dict[str, float]:
    """p50 and p95 of some seconds; nothing of none."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {"p50": round(statistics.median(ordered), 2),
            "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2)}  # fmt: skip
