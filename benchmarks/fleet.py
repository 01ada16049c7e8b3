"""The fleet under fire and at size.

    python benchmarks/fleet.py kills --subjects 1000 --kills 300 --seed 0
    python benchmarks/fleet.py scale --subjects 10000

`kills` trains tiny subjects (a random Stable Diffusion) twice, undisturbed and under seeded SIGKILLs of trainers, their
warm parents, actors and the driver, which is started again by the same command each time. Every fourth kill comes at
the first instant: as soon as a fresh process of that kind is seen. It reports subjects lost and duplicated, adapters
whose digest differs from the undisturbed run, throughput kept, recovery times and what survives each kill.
`scale` measures what the fleet itself costs at 10,000 subjects: no subject is trained.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
RESULTS = ROOT / "benchmarks/results/fleet_cpu_202611"
RECIPE = """
data: {resolution: 16}
train: {steps: 2, batch: 1, lr: 1.0e-3}
lora: {rank: 1}
prior: {images: 2, steps: 1, guidance: 1, batch: 2}
sample: {images: 0}
track: {tensorboard: false}
"""
CLASSES = ("dog", "cat", "vase", "car")
WEIGHTS = {"trainer": 80, "zygote": 6, "actor": 6, "driver": 4}
"""How often each kind of process is chosen, relative to the others; what is not there then is not chosen."""


def make_job(folder: Path, subjects: int, photos: int = 1) -> tuple[Path, Path]:
    """(manifest, recipe) of made-up subjects and a random base, the smallest real thing."""
    from tests.main_job import photo
    from tests.random_models import make_sd

    rows = ["subject,class,images"]
    for number in range(subjects):
        name = f"s{number:05d}"
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(photos):
            photo(10 * number + i, 24, 20).save(folder / "photos" / name / f"{i}.jpg", quality=80)
        rows.append(f"{name},{CLASSES[number % len(CLASSES)]},photos/{name}")
    (folder / "photos.csv").write_text("\n".join(rows) + "\n")
    make_sd(folder / "sd")
    (folder / "recipe.yaml").write_text(RECIPE + f"model: {{path: {folder / 'sd'}}}\n")
    return folder / "photos.csv", folder / "recipe.yaml"


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
    """The living processes of a run by kind: driver, actor, zygote, trainer, and all the others as `ray`."""
    from dbtrain.fleet.processes import descendants

    found: dict[str, list[int]] = {"driver": [driver], "actor": [], "zygote": [], "trainer": [], "ray": []}
    below = descendants(driver)
    zygotes = {pid for pid in below if b"fleet.zygote" in command_of(pid)}
    for pid, parent in below.items():
        if pid in zygotes:
            found["trainer" if parent in zygotes else "zygote"].append(pid)
            continue
        found["actor" if command_of(pid).startswith(b"ray::Actor") else "ray"].append(pid)
    return found


def command_of(pid: int) -> bytes:
    """A process's command line; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Campaign:
    """Kills by a seeded plan while a run goes on."""

    def __init__(self, job: tuple[Path, Path], out: Path, words: list[str], seed: int, kills: int, pause_s: float):
        self.job, self.out, self.words, self.kills, self.pause_s = job, out, words, kills, pause_s
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.first_instant = 0
        self.recovery_s: dict[str, list[float]] = {}
        self.survivors: list[str] = []
        self.waiting: deque[tuple[str, float, str | None]] = deque()
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
        self.kill(victim, kind)
        self.first_instant += instant
        return driver

    def fresh(self, driver: subprocess.Popen, kind: str, known: set[int]) -> int | None:
        """A process of a kind in its first instant; if none appears by itself, one is made to by killing an old one."""
        for _ in range(400):
            there = processes_of(driver.pid)[kind]
            new = [pid for pid in there if pid not in known]
            if new:
                return new[0]
            if there and sum(self.done.values()) + 1 < self.kills and not (set(there) - known) and _ == 50:
                self.kill(self.random.choice(there), kind)
            time.sleep(0.01)
        return None

    def kill(self, pid: int, kind: str) -> None:
        """SIGKILL, and a note of when."""
        from dbtrain.fleet.processes import descendants

        worker = worker_of(self.out, pid)
        below = [(one, start_of(one)) for one in descendants(pid)]
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.below.extend((time.time(), one, born, f"{kind} {command_of(one)[:60].decode()}") for one, born in below)
        self.done[kind] += 1
        self.waiting.append((kind, time.time(), worker))

    def kill_driver(self, driver: subprocess.Popen, look_s: float = 5.0) -> subprocess.Popen:
        """SIGKILL the driver, start it again at once, and look for survivors after 5 s, if there is that much time."""
        if driver.poll() is not None:
            return driver
        below = [pid for group in processes_of(driver.pid).values() for pid in group if pid != driver.pid]
        born = {pid: start_of(pid) for pid in below}
        driver.kill()
        driver.wait()
        killed = time.time()
        self.done["driver"] += 1
        self.waiting.append(("driver", killed, None))
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
        """Time from each kill to the next attempt of the worker that was hit, or of the first worker made after it."""
        for entry in list(self.waiting):
            kind, killed, worker = entry
            same = "worker = ?" if kind in ("trainer", "zygote") and worker else "worker > ?"
            known = "" if kind == "driver" or worker is None else worker
            after = ask(self.out, f"SELECT min(started) FROM attempts WHERE started > ? AND {same}", killed, known)
            if after and after[0][0] is not None:
                self.recovery_s.setdefault(kind, []).append(after[0][0] - killed)
                self.waiting.remove(entry)


def resident_mib(pid: int) -> float:
    """Memory of a process, in MiB; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


def start_of(pid: int) -> str:
    """A process's start, which tells it from a later one of the same pid."""
    from dbtrain.fleet.processes import born

    return born(pid)


def ask(out: Path, question: str, *values: object) -> list[tuple]:
    """Rows of a run's ledger, read beside its driver."""
    try:
        with sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True, timeout=5) as db:
            return db.execute(question, values).fetchall()
    except sqlite3.OperationalError:
        return []


def worker_of(out: Path, pid: int) -> str | None:
    """The worker that a process belongs to, by the actor above it; None if the ledger does not know it yet."""
    from dbtrain.fleet.processes import parent_of

    rows = {row[1]: row[0] for row in ask(out, "SELECT name, pid FROM workers")}
    for _ in range(3):
        if pid in rows:
            return rows[pid]
        pid = parent_of(pid)
    return None


def audit(out: Path, calm: Path, subjects: int) -> dict:
    """What the ledger and the disk say after a run, beside the undisturbed one."""
    states = dict(ask(out, "SELECT state, count(*) FROM subjects GROUP BY state"))
    twice = ask(out, "SELECT count(*) FROM (SELECT position FROM attempts WHERE outcome='finished' "
                     "GROUP BY position HAVING count(*) != 1)")[0][0]  # fmt: skip
    files = {where: dict(ask(where, "SELECT id, files FROM subjects WHERE state='finished'")) for where in (out, calm)}
    differ = [name for name, digests in files[calm].items() if files[out].get(name) != digests]
    remains = sum(1 for path in (out / "subjects").rglob(".*.tmp"))
    attempts = dict(ask(out, "SELECT coalesce(cause, outcome), count(*) FROM attempts GROUP BY 1"))
    trained = [count_lines(out / "subjects" / name / "log.jsonl") for name in files[out]]
    return {
        "states": states,
        "lost": subjects - sum(states.get(state, 0) for state in ("finished", "quarantined")),
        "duplicated": twice,
        "digests_that_differ": len(differ),
        "attempts_by_end": attempts,
        "temporary_files_left": remains,
        "trained_to_the_end_more_than_once": sum(lines > 1 for lines in trained),
    }


def count_lines(path: Path) -> int:
    """Log lines of a subject's last step: how often it was trained to the end."""
    return sum(1 for _ in path.open()) if path.exists() else 0


def quantiles(values: list[float]) -> dict[str, float]:
    """n, p50 and p95 of some seconds."""
    ordered = sorted(values)
    return {"n": len(ordered), "p50": round(statistics.median(ordered), 2),
            "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2)}  # fmt: skip


def kills(options: argparse.Namespace) -> dict:
    """The kill campaign's figures."""
    work = Path(tempfile.mkdtemp(prefix="dbtrain-kills-", dir=options.work))
    job = make_job(work, options.subjects)
    words = ["--workers", str(options.workers), "--hang", "60", "--losses", "100000", "--gang", str(options.gang),
             f"train.batch={options.gang}"]  # fmt: skip
    begin = time.monotonic()
    calm = start_driver(job, work / "calm", words)
    if calm.wait():
        raise SystemExit(f"the undisturbed run failed; see {work / 'calm'}.log")
    calm_s = time.monotonic() - begin
    pause_s = options.pause if options.pause is not None else calm_s / max(1, options.kills)
    campaign = Campaign(job, work / "out", words, options.seed, options.kills, pause_s)
    stormy_s = campaign.run()
    found = {
        "subjects": options.subjects, "workers": options.workers, "gang": options.gang, "seed": options.seed,
        "kills": dict(campaign.done), "kills_total": sum(campaign.done.values()),
        "first_instant_kills": campaign.first_instant,
        "kills_per_min": round(60 * sum(campaign.done.values()) / stormy_s, 1),
        **audit(work / "out", work / "calm", options.subjects),
        "undisturbed_s": round(calm_s, 1), "disturbed_s": round(stormy_s, 1),
        "throughput_kept": round(calm_s / stormy_s, 3),
        "recovery_s": {kind: quantiles(values) for kind, values in campaign.recovery_s.items()},
        "survivors_5_s_after_a_kill": campaign.survivors,
        "driver_mib_at_most": round(max(campaign.driver_mib)),
    }  # fmt: skip
    if not options.keep:
        shutil.rmtree(work)
    return found


def scale(options: argparse.Namespace) -> dict:
    """What the fleet costs by itself: planning, scheduling, committing and looking."""
    from fleet_scale import measure

    return measure(options.subjects, options.workers, Path(options.work or tempfile.gettempdir()))


def about() -> dict:
    """The machine and the versions that a result stands for."""
    import ray
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(),
            "torch": torch.__version__, "ray": ray.__version__, "commit": commit.strip(),
            "command": "python benchmarks/fleet.py " + " ".join(sys.argv[1:])}  # fmt: skip


def write(name: str, found: dict) -> None:
    """Add a result to the result files, and print it."""
    path = RESULTS.with_suffix(".json")
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {**found, "about": about()}
    path.write_text(json.dumps(known, indent=1) + "\n")
    lines = ["# The fleet on two CPU cores\n"]
    for title, values in known.items():
        rows = [f"| {key} | {json.dumps(value)} |" for key, value in values.items() if key != "about"]
        lines += [f"## {title}\n", "| figure | value |", "|---|---|", *rows, ""]
        lines += [f"- {key}: {value}" for key, value in values["about"].items()] + [""]
    RESULTS.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
    print(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "scale"])
    parser.add_argument("--subjects", type=int, default=60)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gang", type=int, default=1)
    parser.add_argument("--pause", type=float, help="Mean seconds between kills; by default they fill the run.")
    parser.add_argument("--work", help="Folder for scratch files.")
    parser.add_argument("--keep", action="store_true", help="Keep the scratch files.")
    parser.add_argument("--dry", action="store_true", help="Print only; leave the result files as they are.")
    options = parser.parse_args()
    found = {"kills": kills, "scale": scale}[options.what](options)
    if options.dry:
        print(json.dumps(found, indent=1))
    else:
        write(options.what + (f" gang {options.gang}" if options.gang > 1 else ""), found)


if __name__ == "__main__":
    main()
