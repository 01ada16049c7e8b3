"""What a run looks like from outside: rows for reports, a summary for scripts, a live table or plain lines for people.

Everything is read from the ledger, so it works beside a driver, after it, and on a run that was killed.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dbtrain.fleet.lease import find_ledger, is_driven
from dbtrain.fleet.ledger import Ledger

WINDOW_S = 120
"""The last seconds over which throughput is measured."""
SLOWEST, QUARANTINED = 10, 20
"""Subjects that a summary names."""
LINE_S = 10.0
"""Seconds between plain lines where there is no terminal."""


def read_rows(out: Path) -> list[dict[str, Any]]:
    """A dict for each subject in manifest order: subject, class, state, attempts, reason, cause, worker, seconds,
    gpu_seconds, stages_s (by stage), files (digests by name), after (outcome of what was asked for it once it was
    finished, by name), started, finished (ISO 8601, UTC)."""
    with closing(Ledger(find_ledger(out))) as ledger:
        after = ledger.afterwards()
        return [
            {
                "subject": row["id"],
                "class": row["class"],
                **{key: row[key] for key in ("state", "reason", "cause", "worker", "seconds", "gpu_seconds")},
                "attempts": row["begun"],
                "stages_s": json.loads(row["stages_s"] or "{}"),
                "files": json.loads(row["files"] or "{}"),
                "after": after.get(row["id"], {}),
                "started": iso(row["started"]),
                "finished": iso(row["finished"]),
            }
            for row in ledger.rows()
        ]


def iso(seconds: float | None) -> str | None:
    """A time as ISO 8601 in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def summarize_run(out: Path) -> dict[str, Any]:
    """A run in one dict: see `summarize`, and whether a driver is at work on it."""
    folder = find_ledger(out)
    with closing(Ledger(folder)) as ledger:
        return {**summarize(ledger), "driven": is_driven(folder)}


def summarize(ledger: Ledger) -> dict[str, Any]:
    """subjects (by state), total, state, heartbeat_age_s, per_s, eta_s, gpu_seconds (by kind of unit), retries (by
    cause), after (number done and failed, by what was asked), slowest [{subject, seconds}], workers, quarantined
    [{subject, cause, reason}] (the first 20)."""
    now, run, counts = time.time(), ledger.run() or {}, ledger.counts()
    begin, lately = ledger.finished_since(now - WINDOW_S)
    per_s = lately / max(now - begin, 1.0) if begin else 0.0
    left = counts["waiting"] + counts["running"]
    return {
        "subjects": counts,
        "total": sum(counts.values()),
        "state": run.get("state"),
        "heartbeat_age_s": None if not run.get("heartbeat") else round(now - run["heartbeat"], 1),
        "per_s": round(per_s, 3),
        "eta_s": round(left / per_s) if per_s and left else None,
        "gpu_seconds": {kind: round(seconds, 3) for kind, seconds in ledger.gpu_seconds().items()},
        "retries": ledger.retries(),
        "after": ledger.counts_after(),
        "slowest": ledger.slowest(SLOWEST),
        "workers": ledger.workers(),
        "quarantined": ledger.quarantined(QUARANTINED),
    }


def line(summary: dict[str, Any]) -> str:
    """A summary in one line."""
    counts = ", ".join(f"{number} {state}" for state, number in summary["subjects"].items() if number)
    eta = "" if summary["eta_s"] is None else f", ETA {summary['eta_s']} s"
    retries = "".join(f", {cause} {number}" for cause, number in summary["retries"].items())
    after = "".join(
        f"; {name}: {', '.join(f'{number} {outcome}' for outcome, number in numbers.items() if number)}"
        for name, numbers in summary["after"].items()
    )
    return f"{counts} of {summary['total']}; {summary['per_s']:.2f} subjects/s{eta}{after}" + (
        f"; retries: {retries[2:]}" if retries else ""
    )


def table(summary: dict[str, Any]) -> Any:
    """A summary for a terminal, as a rich renderable."""
    from rich.console import Group
    from rich.table import Table

    workers = Table("worker", "host", "pid", "state", "unit", "restarts", title="Workers", expand=False)
    for row in summary["workers"][:16]:
        workers.add_row(*(text(str(row[key] if row[key] is not None else "")) for key in
                          ("name", "host", "pid", "state", "unit", "restarts")))  # fmt: skip
    slow = Table("slowest", "seconds", expand=False)
    for row in summary["slowest"][:5]:
        slow.add_row(text(row["subject"]), f"{row['seconds']:.1f}")
    bad = Table("quarantined", "cause", "reason", expand=False)
    for row in summary["quarantined"][:8]:
        bad.add_row(*(text((row[key] or "")[:100]) for key in ("subject", "cause", "reason")))
    lists = [each for each, name in ((slow, "slowest"), (bad, "quarantined")) if summary[name]]
    return Group(text(line(summary)), workers, *lists)


def text(plain: str) -> Any:
    """A string for rich, which takes nothing in it for markup."""
    from rich.text import Text

    return Text(plain)


class Screen:
    """What a driver shows while it works, and its log `fleet.jsonl`: an object for each attempt without a result."""

    def __init__(self, out: Path, quiet: bool):
        self.quiet, self.last = quiet, 0.0
        self.live: Any = None
        self.log = out / "fleet.jsonl"

    def note(self, subject: str, entry: dict[str, Any]) -> None:
        """Log what became of a subject; where lines are printed, print a quarantine too."""
        with self.log.open("a", encoding="utf-8") as file:  # opened each time: `forgetting` puts another in its place
            file.write(json.dumps({"time": iso(time.time()), "subject": subject, **entry}) + "\n")
        if entry["state"] == "quarantined" and not self.quiet and self.live is None:
            self.say(f"{subject}: quarantined: {entry['cause']}: {entry['reason']}")

    def say(self, sentence: str) -> None:
        """Print a line for the person who watches, above the table if there is one."""
        if self.live is not None:
            self.live.console.print(text(sentence))
        else:
            print(sentence, file=sys.stderr, flush=True)

    def show(self, summary: dict[str, Any]) -> None:
        """Update the table, or print a line when it is time. The table begins here: a run that has nothing to do leaves
        the terminal as it is."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            if self.live is None:
                from rich.console import Console
                from rich.live import Live

                self.live = Live(console=Console(stderr=True), refresh_per_second=2)
                self.live.start()
            self.live.update(table(summary))
        elif time.monotonic() - self.last > LINE_S:
            self.last = time.monotonic()
            self.say(line(summary))

    def close(self, summary: dict[str, Any]) -> None:
        """Leave the terminal as it was."""
        if self.live is not None:
            self.live.update(table(summary))
            self.live.stop()
