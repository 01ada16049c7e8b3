"""Runs that live: a service under virtual load, and kills while rows, photos and steps join.

`benchmarks/fleet.py watch` and `living` run this.
"""

import argparse
import random
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
from fleet_kills import Campaign, ask, audit, quantiles, start_driver

from dbtrain.subjects.registry import REGISTRY

MORE_STEPS = "train.steps=6"
HEAD = "subject,class,images\n"
WATCHED = """
CREATE TABLE reopened (position INTEGER);
CREATE TRIGGER reopening AFTER UPDATE OF state ON subjects WHEN OLD.state='finished' AND NEW.state='waiting'
BEGIN INSERT INTO reopened VALUES (NEW.position); END;
"""
"""Has the ledger itself count how often each finished subject is opened again, for more photos or steps."""
TWICE = (
    "SELECT count(*) FROM (SELECT position, count(*) AS times FROM attempts WHERE outcome='finished' "
    "GROUP BY position) AS done "
    "WHERE times != 1 + (SELECT count(*) FROM reopened WHERE reopened.position=done.position)"
)
"""How many subjects were finished more or less often than they were opened."""


class Inbox:
    """A folder of manifests, one a subject, which is filled from the rows of a whole manifest."""

    def __init__(self, job: tuple[Path, Path]):
        self.folder, self.rows = job[0].parent / "inbox", job[0].read_text().splitlines()[1:]
        self.folder.mkdir()
        self.job, self.came = (self.folder, job[1]), dict[str, float]()

    def join(self, number: int) -> None:
        """Let the next subjects come, each with a file that appears whole."""
        for row in self.rows[len(self.came) : len(self.came) + number]:
            name, noun, images = row.split(",")
            hidden = self.folder / f".{name}.tmp"
            hidden.write_text(f"{HEAD}{name},{noun},../{images}\n")
            hidden.rename(self.folder / f"{name}.csv")
            self.came[name] = time.time()


def watch(options: argparse.Namespace) -> dict:
    """The figures of `batch run --watch`: subjects come at random moments beside a backlog, with a restart halfway."""
    from fleet import CLASSES, make_job

    work = Path(tempfile.mkdtemp(prefix="dbtrain-watch-", dir=options.work))
    inbox, dice, out = Inbox(make_job(work, options.subjects, 2)), random.Random(options.seed), work / "out"
    words = ["--workers", str(options.workers), "--hang", "60", "--watch"]
    backlog = options.subjects // 5
    inbox.join(backlog)
    driver, begin, usage = start_driver(inbox.job, out, words), time.time(), []
    warm = wait_for(lambda: finished(out) >= len(CLASSES), driver)
    pause_s = options.minutes * 60 / (options.subjects - backlog)
    due, restarted_s = time.time() + dice.expovariate(1 / pause_s), 0.0
    while len(inbox.came) < options.subjects or finished(out) < options.subjects:
        if time.time() >= due and len(inbox.came) < options.subjects:
            inbox.join(1)
            due += dice.expovariate(1 / pause_s)
        if not restarted_s and len(inbox.came) >= (backlog + options.subjects) // 2:
            driver, restarted_s = restart(driver, inbox, out, words)
        usage.append(look_at(driver.pid, time.time() - begin, finished(out)))
        time.sleep(0.5)
    stop(driver)
    rows = {name: (started, done) for name, started, done in ask(out, "SELECT id, started, finished FROM subjects")}
    late = list(inbox.came)[backlog:]
    found = {
        "subjects": options.subjects, "backlog": backlog, "workers": options.workers, "seed": options.seed,
        "seconds": round(time.time() - begin), "arrivals_per_min": round(60 / pause_s, 1),
        "first_results_s": round(warm, 1),
        "appearance_to_start_s": quantiles([rows[name][0] - inbox.came[name] for name in late]),
        "appearance_to_published_s": quantiles([rows[name][1] - inbox.came[name] for name in late]),
        "backlog_to_published_s": quantiles([rows[name][1] - inbox.came[name] for name in list(inbox.came)[:backlog]]),
        "restart_s": round(restarted_s, 1),
        "driver": [usage[len(usage) * part // 8] for part in range(1, 8)] + usage[-1:],
        "finished_once": ask(out, "SELECT count(*) FROM attempts WHERE outcome='finished'")[0][0],
    }  # fmt: skip
    shutil.rmtree(work)
    return found


def finished(out: Path) -> int:
    """Number of finished subjects."""
    return (ask(out, "SELECT count(*) FROM subjects WHERE state='finished'") or [(0,)])[0][0]


def wait_for(condition, driver: subprocess.Popen) -> float:
    """Seconds until a condition holds."""
    begin = time.monotonic()
    while not condition():
        if driver.poll() is not None:
            raise SystemExit("the driver has ended")
        time.sleep(0.2)
    return time.monotonic() - begin


def restart(driver: subprocess.Popen, inbox: Inbox, out: Path, words: list[str]) -> tuple[subprocess.Popen, float]:
    """The driver that goes on, and the seconds from the request to stop until a subject is finished again."""
    begin = time.monotonic()
    stop(driver)
    before, driver = finished(out), start_driver(inbox.job, out, words)
    inbox.join(1)
    wait_for(lambda: finished(out) > before, driver)
    return driver, time.monotonic() - begin


def stop(driver: subprocess.Popen) -> None:
    """Ask a driver to stop, and see that it leaves with the code that means "run me again"."""
    driver.send_signal(signal.SIGTERM)
    if driver.wait(120) not in (75, -signal.SIGTERM):  # the latter if it had not yet begun to listen
        raise SystemExit(f"the driver left with {driver.returncode}")


def look_at(pid: int, seconds: float, done: int) -> dict[str, float]:
    """Memory and open files of a driver."""
    process = psutil.Process(pid)
    mib = round(process.memory_info().rss / 2**20, 1)
    return {"at_s": round(seconds), "finished": done, "mib": mib, "files": process.num_fds()}


class LivingCampaign(Campaign):
    """Kills while subjects come, photos join some that are finished, and in the end everybody gets more steps."""

    def run(self) -> float:
        """Seconds until the run is complete."""
        begin, inbox = time.monotonic(), self.inbox
        inbox.join(len(inbox.rows) // 5)
        each = -(-(len(inbox.rows) - len(inbox.came)) // self.kills)
        driver = start_driver(self.job, self.out, self.words)
        wait_for(lambda: ask(self.out, "SELECT 1 FROM subjects"), driver)
        with sqlite3.connect(self.out / "ledger.sqlite", timeout=60) as db:
            db.executescript(WATCHED)
        while sum(self.done.values()) < self.kills:
            if driver.poll() is not None:
                raise SystemExit(f"the run ended with {driver.returncode}; see {self.out}.log")
            before = sum(self.done.values())
            driver = self.strike(driver)
            for _ in range(sum(self.done.values()) - before):
                inbox.join(each)
                self.add_photo()
            if sum(self.done.values()) > self.kills // 2 and MORE_STEPS not in self.words:
                self.words = [*self.words, MORE_STEPS]  # the next driver is started with it
            self.note_recovery()
            self.note_survivors()
        inbox.join(len(inbox.rows))
        stop(driver)
        driver = start_driver(self.job, self.out, [word for word in self.words if word != "--watch"])
        if driver.wait():
            raise SystemExit(f"the run ended with {driver.returncode}; see {self.out}.log")
        return time.monotonic() - begin

    def add_photo(self) -> None:
        """Let a photo join a finished subject that has one."""
        done = [name for name, in ask(self.out, "SELECT id FROM subjects WHERE state='finished'")]
        alone = [name for name in done if len(list((self.photos / name).iterdir())) == 1]
        if alone and self.random.random() < 0.3:
            name = self.random.choice(alone)
            from tests.kit.main_job import photo

            hidden = self.photos.parent / f"{name}.jpg"
            photo(10 * int(name[1:]) + 9, 24, 20).save(hidden, quality=80)
            hidden.rename(self.photos / name / "1.jpg")


def living(options: argparse.Namespace) -> dict:
    """The figures of kills over a run that lives, beside a run that knew everything from the start."""
    from fleet import make_job

    work = Path(tempfile.mkdtemp(prefix="dbtrain-living-", dir=options.work))
    job = make_job(work, options.subjects)
    inbox = Inbox(job)
    words = ["--workers", str(options.workers), "--hang", "60", "--losses", "100000", "--watch"]
    pause_s = options.pause if options.pause is not None else 1.0
    campaign = LivingCampaign(inbox.job, work / "out", words, options.seed, options.kills, pause_s)
    campaign.inbox, campaign.photos = inbox, work / "photos"
    stormy_s = campaign.run()
    begin = time.monotonic()
    (work / "whole").mkdir()  # an identifier depends on who had one before, so it is given the ones of those who joined
    shutil.copy(work / "out" / REGISTRY, work / "whole" / REGISTRY)
    whole = start_driver(job, work / "whole", ["--workers", str(options.workers), "--hang", "60", MORE_STEPS])
    if whole.wait():
        raise SystemExit(f"the run that knew everything failed; see {work / 'whole'}.log")
    audited = audit(work / "out", work / "whole", options.subjects)
    audited["duplicated"] = ask(work / "out", TWICE)[0][0]
    audited.pop("trained_to_the_end_more_than_once")  # a subject that gets more steps is, and shall be
    found = {
        "subjects": options.subjects, "workers": options.workers, "seed": options.seed,
        "kills": dict(campaign.done), "kills_total": sum(campaign.done.values()),
        "first_instant_kills": campaign.first_instant,
        "rows_that_joined": len(inbox.rows) - len(inbox.rows) // 5,
        "photos_that_joined": len(list((work / "photos").glob("*/1.jpg"))), "steps": "4, then 6",
        "opened_again": ask(work / "out", "SELECT count(*) FROM reopened")[0][0], **audited,
        "disturbed_s": round(stormy_s, 1), "whole_at_once_s": round(time.monotonic() - begin, 1),
        "recovery_s": campaign.recovery(), "survivors_5_s_after_a_kill": campaign.survivors,
    }  # fmt: skip
    if not options.keep:
        shutil.rmtree(work)
    return found
