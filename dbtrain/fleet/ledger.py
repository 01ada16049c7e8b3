"""The ledger: what became of every subject of a run, in SQLite on a local disk, written by one driver.

A subject's state changes by compare-and-set on (state, attempt): a late word from an attempt that was given up changes
nothing, so each subject finishes once. Commits are durable (WAL, synchronous=FULL), many changes to one commit.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError, FleetError

NAME = "ledger.sqlite"
LOCK = "ledger.lock"
WHERE = "ledger.where"
"""In an output folder whose ledger is elsewhere: a file with that folder's path."""
VERSION = 2
STATES = ("waiting", "running", "finished", "quarantined", "cancelled", "skipped")
REMOTE = {"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "9p", "ceph", "lustre", "gpfs", "afs", "beegfs", "glusterfs",
          "pvfs2", "wekafs"}  # fmt: skip
"""File systems on which SQLite's locks or shared memory cannot be relied on (sqlite.org/wal.html)."""
LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.bindfs", "fuse.mergerfs", "fuse.gocryptfs", "fuse.encfs", "fuse.lxcfs"}
"""What `fuse.` names that is not a bucket or another machine's disk."""
LEASE_TRIES = 50
"""Looks, 10 ms apart, at a lease that is held: `is_driven` holds it too, for an instant."""
SCHEMA = """
CREATE TABLE run (
  one INTEGER PRIMARY KEY CHECK (one = 1), config TEXT, config_digest TEXT, manifest TEXT, manifest_digest TEXT,
  base_digest TEXT, created REAL, driver_pid INTEGER, driver_host TEXT, heartbeat REAL, state TEXT);
CREATE TABLE subjects (
  position INTEGER PRIMARY KEY, id TEXT UNIQUE, class TEXT, spec TEXT, state TEXT NOT NULL, attempts INTEGER NOT NULL,
  failures INTEGER NOT NULL, losses INTEGER NOT NULL, pack INTEGER, worker TEXT, cause TEXT, reason TEXT,
  run TEXT, files TEXT, seconds REAL, gpu_seconds REAL, stages_s TEXT, started REAL, finished REAL);
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


class Lease:
    """The right to drive a run: a locked file, which the kernel frees the instant its holder is dead."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        if not any(self._take() for _ in range(LEASE_TRIES)):
            holder = os.pread(self.descriptor, 200, 0).decode(errors="replace").strip()
            os.close(self.descriptor)
            raise FleetError(
                f"{folder}: another driver ({holder or 'starting'}) is at work on this run; wait for it, watch it with "
                f"`dbtrain batch status {folder}`, or stop it (SIGTERM) and run the same command again"
            )
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def _take(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
            return False
        return True

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


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that holds an absolute path, by the text of /proc/self/mounts."""
    best = ("", "")
    for line in mounts.splitlines():
        _, place, kind = line.split()[:3]
        place = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place)
        if Path(path).is_relative_to(place) and len(place) >= len(best[0]):
            best = (place, kind)
    return best[1]


def check_local(folder: Path) -> None:
    """Nothing; FleetError if a ledger in this folder could lose what it was told."""
    mounts = Path("/proc/self/mounts").read_text("utf-8", "surrogateescape")
    if is_remote(kind := file_system(folder.resolve(), mounts)):
        raise FleetError(
            f"{folder}: is on {kind}, where SQLite can lose commits; give --ledger a folder on a local disk of the "
            "driver's machine (results may stay where they are)"
        )


def is_remote(kind: str) -> bool:
    """Whether a file system of this type is a network's or a bucket's."""
    return kind in REMOTE or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)


class Ledger:
    """An open ledger. Changes go inside `with ledger.commit():`; one block is one durable commit."""

    def __init__(self, folder: Path, create: bool = False):
        check_local(folder)
        path = folder / NAME
        if not create and not path.exists():
            raise DataError(f"{folder}: holds no run ({NAME} is missing); start one with `dbtrain batch run`")
        try:
            self._open(path)
        except sqlite3.OperationalError as error:
            raise FleetError(f"{path}: the ledger cannot be opened and written ({error}); restore access") from error
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path}: is no ledger ({error}); put a copy back, or use another --out") from error

    def _open(self, path: Path) -> None:
        self.db = sqlite3.connect(path, isolation_level=None, timeout=30)
        self.db.row_factory = sqlite3.Row
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        found = self.db.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, VERSION):
            raise DataError(f"{path}: has format {found}, this dbtrain knows {VERSION}; use the version that made it")
        if not found:
            self.db.executescript(f"BEGIN;{SCHEMA}PRAGMA user_version={VERSION};COMMIT;")

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
        self, about: dict[str, str], specs: Iterable[dict[str, Any]], skipped: dict[str, str] | None = None
    ) -> None:
        """Enter a run and its subjects, all waiting. A spec is what training needs of a subject besides its photos.
        skipped: reasons of subjects that are left out, by id."""
        self.db.execute(
            "INSERT INTO run (one, config, config_digest, manifest, manifest_digest, created, state) "
            "VALUES (1, :config, :config_digest, :manifest, :manifest_digest, :created, 'new')",
            {**about, "created": time.time()},
        )
        row = (
            "INSERT INTO subjects (position, id, class, spec, state, reason, attempts, failures, losses) "
            "VALUES (?, ?, ?, ?, ?, ?, 0, 0, 0)"
        )
        rows = ((n, spec["id"], spec["class_noun"], json.dumps(spec), "waiting", None) for n, spec in enumerate(specs))
        self.db.executemany(row, rows)
        left_out = ((None, name, None, "{}", "skipped", reason) for name, reason in (skipped or {}).items())
        self.db.executemany(row, left_out)

    def same_base(self, digest: str) -> bool:
        """Whether this is the base of the run so far; the first one told is."""
        self.db.execute("UPDATE run SET base_digest=? WHERE base_digest IS NULL", (digest,))
        return self.db.execute("SELECT base_digest FROM run").fetchone()[0] == digest

    def beat(self, state: str) -> None:
        """Say that the driver lives, and what it does."""
        self.db.execute(
            "UPDATE run SET driver_pid=?, driver_host=?, heartbeat=?, state=?",
            (os.getpid(), socket.gethostname(), time.time(), state),
        )

    def take_over(self) -> int:
        """How many subjects a dead driver left running; they wait again, without blame."""
        now = time.time()
        self.db.execute(
            "UPDATE attempts SET ended=?, outcome='lost', cause='driver' WHERE outcome IS NULL",
            (now,),
        )
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
        """Whether this attempt was the one that finishes the subject; False for a late or repeated word.

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
            found = self.db.execute(f"{change} RETURNING position, class", (new, reason, *old)).fetchall()
        else:
            one = f"{change} AND id=? RETURNING position, class"
            found = [row for name in ids for row in self.db.execute(one, (new, reason, *old, name)).fetchall()]
        return [tuple(row) for row in found]

    def note_after(self, position: int, name: str, how: str, outcome: str) -> None:
        """Keep what became of something that was asked for a finished subject: `done`, or why not. how: settings."""
        self.db.execute("INSERT OR REPLACE INTO afterwards VALUES (?, ?, ?, ?)", (position, name, how, outcome))

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
        found = [self.db.execute(question, (name, name, how)).fetchall() for name, how in asked.items()]
        return sorted((tuple(row) for rows in found for row in rows), key=lambda row: row[0])

    def afterwards(self) -> dict[int, dict[str, str]]:
        """What became of what was asked for finished subjects: outcomes by name, by position."""
        found: dict[int, dict[str, str]] = {}
        for position, name, outcome in self.db.execute("SELECT position, name, outcome FROM afterwards"):
            found.setdefault(position, {})[name] = outcome
        return found

    def note_spent(self, kind: str, class_noun: str, worker: str, seconds: float, outcome: str, reason: str) -> None:
        """Keep what a unit that trains nobody took."""
        row = (kind, class_noun, worker, seconds, time.time(), outcome, reason)
        self.db.execute("INSERT INTO spent VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def note_worker(self, worker: dict[str, Any]) -> None:
        """Keep where a worker is and what it does."""
        self.db.execute(
            "INSERT OR REPLACE INTO workers VALUES (:name, :node, :host, :pid, :state, :unit, :since, :restarts)",
            {**worker, "since": time.time()},
        )

    def drop_worker(self, name: str) -> None:
        """Forget a worker that is gone."""
        self.db.execute("DELETE FROM workers WHERE name=?", (name,))

    def rows(self, columns: str = "*", where: str = "1") -> list[sqlite3.Row]:
        """Subjects in manifest order; both arguments are our own SQL, never a user's words."""
        return self.db.execute(f"SELECT {columns} FROM subjects WHERE {where} ORDER BY position").fetchall()  # noqa: S608

    def row(self, position: int) -> sqlite3.Row:
        """One subject."""
        return self.db.execute("SELECT * FROM subjects WHERE position=?", (position,)).fetchone()

    def specs(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """What training needs of these subjects, in their order."""
        found = [self.db.execute("SELECT spec FROM subjects WHERE position=?", (p,)).fetchone() for p in positions]
        return [json.loads(row[0]) for row in found]

    def counts(self) -> dict[str, int]:
        """Number of subjects by state, every state named."""
        found = dict(self.db.execute("SELECT state, count(*) FROM subjects GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in STATES}
