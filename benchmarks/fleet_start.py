"""What a driver's start and an actor's replacement cost, by process; `benchmarks/fleet.py start` runs this."""

import argparse
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from fleet_kills import ask, processes_of, start_driver

TICKS = os.sysconf("SC_CLK_TCK")
WAIT_S = 600.0


def start(options: argparse.Namespace) -> dict:
    """Seconds, and processor seconds by kind of process, until work goes on: after a kill of the driver, which is
    started again by the same command, and after a kill of an actor. A first round draws priors and is not counted."""
    from fleet import make_job

    work = Path(tempfile.mkdtemp(prefix="dbtrain-start-", dir=options.work))
    job, out = make_job(work, options.subjects), work / "out"
    words = ["--workers", str(options.workers), "--hang", "60", "--losses", "100000", "train.steps=100000"]
    rounds: dict[str, list[Counter]] = {"driver": [], "actor": []}
    for number in range(options.rounds + 1):
        begin = time.time()
        driver = start_driver(job, out, words)
        wait_for_attempt(out, begin)
        found = spent(driver.pid, set()) + Counter(wall=time.time() - begin)
        if number:
            rounds["driver"].append(found)
            before = alive(driver.pid)
            begin = time.time()
            os.kill(processes_of(driver.pid)["actor"][0], signal.SIGKILL)
            # The other worker may begin something, too: only who is new counts.
            wait_for_attempt(out, begin, known={name for name, in ask(out, "SELECT DISTINCT worker FROM attempts")})
            rounds["actor"].append(spent(driver.pid, before) + Counter(wall=time.time() - begin))
        driver.kill()
        driver.wait()
        time.sleep(2)
    shutil.rmtree(work)
    return {
        "rounds": options.rounds, "workers": options.workers,
        **{f"after_a_{kind}s_death_s": {name: round(statistics.median(one[name] for one in found), 2)
                                        for name in sorted(set().union(*found))} for kind, found in rounds.items()},
        **{f"cpu_s_after_a_{kind}s_death": round(statistics.median(sum(one.values()) - one["wall"] for one in found), 2)
           for kind, found in rounds.items()},
        "load": os.getloadavg()[1],
    }  # fmt: skip


def wait_for_attempt(out: Path, since: float, known: set[str] = frozenset()) -> None:
    """Wait until an attempt has begun, of a worker that is not known."""
    marks = ",".join("?" * len(known))
    question = f"SELECT 1 FROM attempts WHERE started > ? AND worker NOT IN ({marks})"
    until = time.monotonic() + WAIT_S
    while not ask(out, question, since, *known):
        if time.monotonic() > until:
            raise SystemExit(f"no work began; see {out}.log")
        time.sleep(0.02)


def alive(driver: int) -> set[int]:
    """The processes of a run."""
    return {pid for pids in processes_of(driver).values() for pid in pids}


def spent(driver: int, before: set[int]) -> Counter:
    """Processor seconds by kind of the processes of a run that were not there before, with what they waited for."""
    found: Counter = Counter()
    for kind, pids in processes_of(driver).items():
        for pid in set(pids) - before:
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            found[kind] += sum(map(int, fields[11:15])) / TICKS
    return found
