"""The ledger: what became of every subject of a run, in SQLite on a local disk, written by the lease's holder.

A subject's state changes by compare-and-set on (state, attempt): a late message of an attempt that was given up changes
nothing, so each subject finishes once. Commits are durable (WAL, synchronous=FULL), many changes to one commit.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError, FleetError
from dbtrain.fleet.lease import NAME, check_local
from dbtrain.values import Subject

VERSION = 2
STATES = ("waiting", "running", "finished", "quarantined", "cancelled", "skipped", "forgotten")
SCHEMA = """
CREATE TABLE run (
  one INTEGER PRIMARY KEY CHECK (one = 1), config TEXT, config_digest TEXT, manifest TEXT, manifest_digest TEXT,
  base_digest TEXT, created REAL, driver_pid INTEGER, driver_host TEXT, heartbeat REAL, state TEXT, pack INTEGER,
  photos_digest TEXT);
CREATE TABLE subjects (
  position INTEGER PRIMARY KEY, id TEXT UNIQUE, class TEXT, spec TEXT, state TEXT NOT NULL, attempts INTEGER NOT NULL,
  failures INTEGER NOT NULL, losses INTEGER NOT NULL, pack INTEGER, worker TEXT, cause TEXT, reason TEXT,
  run TEXT, files TEXT, seconds REAL, gpu_seconds REAL, stages_s TEXT, started REAL, finished REAL,
  photos TEXT);
CREATE INDEX by_state ON subjects (state);
CREATE TABLE afterwards (
  position INTEGER, name TEXT, how TEXT, outcome TEXT, PRIMARY KEY (position, name)) WITHOUT ROWID;
CREATE TABLE attempts (
  position INTEGER, attempt INTEGER, unit INTEGER, worker TEXT, started REAL, ended REAL, outcome TEXT, cause TEXT,
  reason TEXT, gpu_seconds REAL, PRIMARY KEY (position, attempt)) WITHOUT ROWID;
CREATE TABLE spent (kind TEXT, class TEXT, worker TEXT, gpu_seconds REAL, ended REAL, outcome TEXT, reason TEXT);
CREATE TABLE workers (name TEXT PRIMARY KEY, node TEXT, host TEXT, pid INTEGER, state TEXT, unit INTEGER, since REAL,
  restarts INTEGER);
"""


ADDED = (("run", "pack", "INTEGER"), ("run", "photos_digest", "TEXT"), ("subjects", "photos", "TEXT"))
"""(table, column, type) of what ledgers of this format lack that an earlier dbtrain made."""
ENTER = (
    "INSERT INTO subjects (position, id, class, spec, state, reason, attempts, failures, losses) "
    "VALUES (?, ?, ?, ?, ?, ?, 0, 0, 0)"
)


KEPT_FIELDS = tuple(each.name for each in fields(Subject) if each.name not in ("images", "masks"))
"""What the ledger keeps of a subject. Photos and masks are in the shards."""


def encode_subject(subject: Subject) -> str:
    """A subject as the ledger keeps it, in JSON."""
    return json.dumps({name: getattr(subject, name) for name in KEPT_FIELDS})


def decode_subject(text: str) -> Subject:
    """A subject as the ledger keeps it, without photos."""
    about = json.loads(text)
    captions = about.pop("captions", None)
    return Subject(images=(), captions=None if captions is None else tuple(captions), **about)


class Ledger:
    """An open ledger. Changes go inside `with ledger.commit():`; one block is one durable commit."""

    def __init__(self, folder: Path, create: bool = False):
        check_local(folder)
        path = folder / NAME
        if not create and not path.exists():
            raise DataError(f"{folder}: holds no run ({NAME} is missing); start one with `dbtrain batch run`")
        try:
            self._open(path)
            if create:
                self._add_columns()
        except sqlite3.OperationalError as error:
            raise FleetError(f"{path}: the ledger cannot be opened and written ({error}); restore access") from error
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path}: is no ledger ({error}); put a copy back, or use another --out") from error

    def _open(self, path: Path) -> None:
        self.db = sqlite3.connect(path, isolation_level=None, timeout=30)
        self.db.row_factory = sqlite3.Row
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        version = self.db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise DataError(f"{path}: has format {version}, this dbtrain knows {VERSION}; use the version that made it")
        if not version:
            self.db.executescript(f"BEGIN;{SCHEMA}PRAGMA user_version={VERSION};COMMIT;")

    def _add_columns(self) -> None:
        """Add what ledgers of this format that an earlier dbtrain made lack; a driver alone does this."""
        for table, name, kind in ADDED:
            if name not in {row["name"] for row in self.db.execute(f"PRAGMA table_info({table})")}:
                self.db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")

    def close(self) -> None:
        """Let go of the file."""
        self.db.close()

    @contextmanager
    def commit(self) -> Iterator[None]:
        """One durable change, whole or not at all; FleetError when the disk takes no more."""
        try:
            self.db.execute("BEGIN IMMEDIATE")
            yield
            self.db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self._undo()
            raise FleetError(
                f"ledger: cannot be written ({error}); free disk space or restore access, then run the same command"
            ) from error
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> None:
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")

    def run(self) -> dict[str, Any] | None:
        """The run this ledger is of, or None before `create_run`."""
        row = self.db.execute("SELECT * FROM run").fetchone()
        return dict(row) if row else None

    def create_run(
        self, about: Mapping[str, str | None], subjects: Iterable[Subject], skipped: dict[str, str] | None = None
    ) -> None:
        """Enter a run and its subjects, all waiting. `identifier` of a subject is the one that it was given.
        skipped: reasons of subjects that are left out, by id."""
        self.db.execute(
            "INSERT INTO run (one, config, config_digest, manifest, manifest_digest, photos_digest, created, state) "
            "VALUES (1, :config, :config_digest, :manifest, :manifest_digest, :photos_digest, :created, 'new')",
            {"photos_digest": None, **about, "created": time.time()},
        )
        waiting = ((n, each.id, each.class_noun, encode_subject(each), "waiting", None)
                   for n, each in enumerate(subjects))  # fmt: skip
        self.db.executemany(ENTER, waiting)
        left_out = ((None, name, None, "{}", "skipped", reason) for name, reason in (skipped or {}).items())
        self.db.executemany(ENTER, left_out)

    def note_photos(self, digests: Mapping[str, str], anew: bool = True) -> None:
        """Keep one digest of each subject's stored photos, by id. anew: also where there is one."""
        where = "id=?" if anew else "id=? AND photos IS NULL"
        change = f"UPDATE subjects SET photos=? WHERE {where}"  # noqa: S608 - our own
        self.db.executemany(change, [(digest, name) for name, digest in digests.items()])

    def same_base(self, digest: str) -> bool:
        """Whether the digest equals the run's; the first one is stored."""
        self.db.execute("UPDATE run SET base_digest=? WHERE base_digest IS NULL", (digest,))
        return self._value("SELECT base_digest FROM run") == digest

    def pack(self) -> int | None:
        """Rows of this run's packs as they were measured; None before that."""
        return self._value("SELECT pack FROM run")

    def note_pack(self, size: int) -> None:
        """Keep how many rows packs have, for all workers and all later drivers."""
        self.db.execute("UPDATE run SET pack=?", (size,))

    def _value(self, question: str, *values: Any) -> Any:
        row = self.db.execute(question, values).fetchone()
        return row and row[0]

    def beat(self, state: str) -> None:
        """Note that the driver is alive, and its state."""
        self.db.execute(
            "UPDATE run SET driver_pid=?, driver_host=?, heartbeat=?, state=?",
            (os.getpid(), socket.gethostname(), time.time(), state),
        )

    def take_over(self) -> int:
        """How many subjects a dead driver left running; they wait again, without blame."""
        lost = "UPDATE attempts SET ended=?, outcome='lost', cause='driver' WHERE outcome IS NULL"
        self.db.execute(lost, (time.time(),))
        self.db.execute("DELETE FROM workers")
        return self.db.execute("UPDATE subjects SET state='waiting' WHERE state='running'").rowcount

    def start(self, unit: int, positions: Sequence[int], worker: str) -> dict[int, int]:
        """The number of the attempt that begins for each subject of a unit; only waiting ones may begin."""
        now, attempts = time.time(), {}
        for position in positions:
            row = self.db.execute(
                "UPDATE subjects SET state='running', attempts=attempts+1, worker=?, started=? "
                "WHERE position=? AND state='waiting' RETURNING attempts",
                (worker, now, position),
            ).fetchone()
            if row is None:
                raise FleetError(f"ledger: subject number {position} was given out while it was not waiting")
            attempts[position] = row[0]
        self.db.executemany(
            "INSERT INTO attempts (position, attempt, unit, worker, started) VALUES (?, ?, ?, ?, ?)",
            [(position, attempt, unit, worker, now) for position, attempt in attempts.items()],
        )
        return attempts

    def finish(self, position: int, attempt: int, result: dict[str, Any]) -> bool:
        """Whether this attempt was the one that finishes the subject; False for a late or repeated message.

        result: run (digest), files (digests by name), seconds, gpu_seconds, stages_s.
        """
        now = time.time()
        values = {**result, "files": json.dumps(result["files"]), "stages_s": json.dumps(result["stages_s"])}
        done = self.db.execute(
            "UPDATE subjects SET state='finished', cause=NULL, reason=NULL, run=:run, files=:files, "
            "seconds=:seconds, gpu_seconds=COALESCE(gpu_seconds, 0)+:gpu_seconds, stages_s=:stages_s, finished=:now "
            "WHERE position=:position AND state='running' AND attempts=:attempt",
            {**values, "now": now, "position": position, "attempt": attempt},
        ).rowcount
        if done:
            self._end(position, attempt, "finished", None, None, result["gpu_seconds"])
        return bool(done)

    def fail(self, position: int, attempt: int, verdict: dict[str, Any], gpu_seconds: float = 0.0) -> bool:
        """Whether this attempt's end was noted. verdict: state, failures, losses, pack, cause, reason."""
        done = self.db.execute(
            "UPDATE subjects SET state=:state, failures=:failures, losses=:losses, pack=:pack, cause=:cause, "
            "reason=:reason, gpu_seconds=COALESCE(gpu_seconds, 0)+:spent "
            "WHERE position=:position AND state='running' AND attempts=:attempt",
            {**verdict, "spent": gpu_seconds, "position": position, "attempt": attempt},
        ).rowcount
        if done:
            self._end(position, attempt, verdict["state"], verdict["cause"], verdict["reason"], gpu_seconds)
        return bool(done)

    def _end(self, position: int, attempt: int, outcome: str, cause: str | None, reason: str | None, s: float) -> None:
        self.db.execute(
            "UPDATE attempts SET ended=?, outcome=?, cause=?, reason=?, gpu_seconds=? WHERE position=? AND attempt=?",
            (time.time(), outcome, cause, reason, s, position, attempt),
        )

    def settle(self, ids: Sequence[str] | None, old: Sequence[str], new: str, reason: str) -> list[tuple[int, str]]:
        """(position, class) of the subjects (None is all) that went from one of the states `old` to `new`."""
        where = f"state IN ({','.join('?' * len(old))})"
        fresh = ", failures=0, losses=0, pack=NULL" if new == "waiting" else ""
        change = f"UPDATE subjects SET state=?, reason=?, cause=NULL{fresh} WHERE {where}"  # noqa: S608 - only marks
        if ids is None:
            changed = self.db.execute(f"{change} RETURNING position, class", (new, reason, *old)).fetchall()
        else:
            by_id = f"{change} AND id=? RETURNING position, class"
            changed = [row for name in ids for row in self.db.execute(by_id, (new, reason, *old, name)).fetchall()]
        return [tuple(row) for row in changed]

    def give_up_class(self, noun: str, reason: str) -> set[int]:
        """The positions of a class's waiting subjects, which are quarantined now."""
        question = (
            "UPDATE subjects SET state='quarantined', reason=?, cause=NULL "
            "WHERE state='waiting' AND class=? RETURNING position"
        )
        return {row[0] for row in self.db.execute(question, (reason, noun)).fetchall()}

    def note_after(self, position: int, name: str, how: str, outcome: str) -> None:
        """Keep what became of something that was asked for a finished subject: `done`, or why not. how: settings."""
        self.db.execute("INSERT OR REPLACE INTO afterwards VALUES (?, ?, ?, ?)", (position, name, how, outcome))

    def forget_after(self, positions: Iterable[int]) -> None:
        """Forget what was done with subjects whose result is to be made anew."""
        self.db.executemany("DELETE FROM afterwards WHERE position=?", [(position,) for position in positions])

    def retry_after(self, asked: Mapping[str, str]) -> None:
        """Forget of what is asked (settings by name) whatever was not done, so that it is tried again."""
        for name in asked:
            self.db.execute("DELETE FROM afterwards WHERE name=? AND outcome!='done'", (name,))

    def open_after(self, asked: Mapping[str, str]) -> list[tuple[int, str, str]]:
        """(position, class, name) of what is asked (settings by name) for finished subjects and was not tried so, in
        storage order."""
        question = (
            "SELECT position, class, ? FROM subjects WHERE state='finished' AND NOT EXISTS "
            "(SELECT 1 FROM afterwards a WHERE a.position=subjects.position AND a.name=? AND a.how=?)"
        )
        missing = [self.db.execute(question, (name, name, how)).fetchall() for name, how in asked.items()]
        return sorted((tuple(row) for rows in missing for row in rows), key=lambda row: row[0])

    def afterwards(self) -> dict[str, dict[str, str]]:
        """What became of what was asked for finished subjects: outcomes by name, by subject, in manifest order."""
        question = "SELECT id, name, outcome FROM afterwards JOIN subjects USING (position) ORDER BY position"
        outcomes: dict[str, dict[str, str]] = {}
        for subject, name, outcome in self.db.execute(question):
            outcomes.setdefault(subject, {})[name] = outcome
        return outcomes

    def counts_after(self) -> dict[str, dict[str, int]]:
        """Numbers `done` and `failed` of what was asked for finished subjects, by name."""
        counts = self.db.execute("SELECT name, sum(outcome='done'), sum(outcome!='done') FROM afterwards GROUP BY name")
        return {name: {"done": done, "failed": failed} for name, done, failed in counts}

    def note_spent(self, kind: str, class_noun: str, worker: str, seconds: float, outcome: str, reason: str) -> None:
        """Keep the GPU-seconds of a unit that trains no subject."""
        row = (kind, class_noun, worker, seconds, time.time(), outcome, reason)
        self.db.execute("INSERT INTO spent VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def note_worker(self, worker: dict[str, Any]) -> None:
        """Keep where a worker is, its state and its unit."""
        self.db.execute(
            "INSERT OR REPLACE INTO workers VALUES (:name, :node, :host, :pid, :state, :unit, :since, :restarts)",
            {**worker, "since": time.time()},
        )

    def drop_worker(self, name: str) -> None:
        """Forget a worker that is gone."""
        self.db.execute("DELETE FROM workers WHERE name=?", (name,))

    def row(self, position: int) -> sqlite3.Row:
        """One subject."""
        return self.db.execute("SELECT * FROM subjects WHERE position=?", (position,)).fetchone()

    def rows(self) -> list[sqlite3.Row]:
        """All subjects in manifest order. begun: attempts in which work on the subject had begun."""
        unbegun = "SELECT count(*) FROM attempts a WHERE a.position=subjects.position AND a.cause='unbegun'"
        question = f"SELECT *, attempts - ({unbegun}) AS begun FROM subjects ORDER BY position"  # noqa: S608 - our own
        return self.db.execute(question).fetchall()

    def waiting(self) -> list[sqlite3.Row]:
        """The subjects that wait, in manifest order."""
        return self.db.execute("SELECT * FROM subjects WHERE state='waiting' ORDER BY position").fetchall()

    def ids(self) -> set[str]:
        """The ids of all subjects."""
        return {row[0] for row in self.db.execute("SELECT id FROM subjects")}

    def subjects(self, positions: Sequence[int]) -> tuple[Subject, ...]:
        """What training needs of these subjects, in their order."""
        return tuple(decode_subject(self._value("SELECT spec FROM subjects WHERE position=?", p)) for p in positions)

    def widest(self) -> tuple[int, int | None]:
        """Subjects of the largest class, and the highest LoRA rank that a subject has of its own (None: none has)."""
        largest = "SELECT max(n) FROM (SELECT count(*) n FROM subjects WHERE class NOT NULL GROUP BY class)"
        return self._value(largest), self._value("SELECT max(json_extract(spec, '$.rank')) FROM subjects")

    def counts(self) -> dict[str, int]:
        """Number of subjects by state, every state named."""
        counts = self._table("SELECT state, count(*) FROM subjects GROUP BY state")
        return {state: counts.get(state, 0) for state in STATES}

    def finished_since(self, moment: float) -> tuple[float | None, int]:
        """The first time at which a subject was finished after a moment, and how many were."""
        question = "SELECT min(finished), count(*) FROM subjects WHERE finished > ?"
        return tuple(self.db.execute(question, (moment,)).fetchone())

    def gpu_seconds(self) -> dict[str, float]:
        """GPU-seconds by kind of unit."""
        spent = self._table("SELECT kind, sum(gpu_seconds) FROM spent GROUP BY kind")
        return {**spent, "train": self._value("SELECT sum(gpu_seconds) FROM subjects") or 0.0}

    def retries(self) -> dict[str, int]:
        """Number of attempts that ended without a result, by cause, the most frequent first."""
        return self._table(
            "SELECT cause, count(*) FROM attempts WHERE cause IS NOT NULL AND cause != 'unbegun' "
            "GROUP BY cause ORDER BY 2 DESC"
        )

    def slowest(self, number: int) -> list[dict[str, Any]]:
        """subject and seconds of the subjects that took longest."""
        return self._dicts("SELECT id AS subject, seconds FROM subjects WHERE seconds IS NOT NULL "
                           "ORDER BY seconds DESC LIMIT ?", number)  # fmt: skip

    def quarantined(self, number: int) -> list[dict[str, Any]]:
        """subject, cause and reason of the first quarantined subjects."""
        return self._dicts("SELECT id AS subject, cause, reason FROM subjects WHERE state='quarantined' "
                           "ORDER BY position LIMIT ?", number)  # fmt: skip

    def workers(self) -> list[dict[str, Any]]:
        """The workers, as `note_worker` keeps them."""
        return self._dicts("SELECT * FROM workers ORDER BY name")

    def costs(self) -> tuple[list[tuple[str, float]], float | None]:
        """(id, GPU-seconds) of each finished subject, and GPU-seconds of a class's priors (None: not measured)."""
        own = "SELECT id, gpu_seconds FROM subjects WHERE state='finished' AND gpu_seconds NOT NULL ORDER BY position"
        priors = "SELECT sum(gpu_seconds) / count(DISTINCT class) FROM spent WHERE kind='prior'"
        return [tuple(row) for row in self.db.execute(own)], self._value(priors)

    def _table(self, question: str) -> dict[Any, Any]:
        return dict(self.db.execute(question).fetchall())

    def _dicts(self, question: str, *values: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in self.db.execute(question, values)]
