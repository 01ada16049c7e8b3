"""Forgetting subjects of a run: everything about a person is removed, and the subjects beside it keep every bit.

A note of who is being forgotten (`subjects/forgotten.py`) comes first and goes last, and every step may be done twice.
So a kill at any moment leaves work that the same command, or the next driver, ends. Tombstones come second: from then
on nobody trains the subject again. The report's lock is held all the while, so that no build brings a page back.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbtrain.data.index import INDEX_NAME, Index
from dbtrain.data.shards import grow_shards, tidy
from dbtrain.data.stream import SKIPPED, read_samples
from dbtrain.errors import DataError, FleetError, SubjectTaken, first_line, named
from dbtrain.evaluate import RESULT
from dbtrain.fleet.inbox import INBOX
from dbtrain.fleet.lease import Lease, find_ledger, has_ledger, is_driven
from dbtrain.fleet.ledger import Ledger
from dbtrain.results.record import drop_record
from dbtrain.results.upload import delete_copy, uploads_of
from dbtrain.results.uploading import PAUSES_S
from dbtrain.storage.atomic import LOCK, held, sweep, sync_folder, write_file
from dbtrain.subjects.forgotten import Tombstones, bury, change_pending, read_pending, read_tombstones
from dbtrain.subjects.registry import REGISTRY, forget_identifiers
from dbtrain.values import SUBJECT_ID

REPORT = "report"
COPIES = "forgetting-copies.json"
"""The addresses of forgotten subjects' uploaded copies, from before their folders are removed until the copies are."""
WAIT_S = 30.0
"""How long to wait for a trainer that was killed to let go of a subject."""
ERASE = (
    "UPDATE subjects SET id=?, class=NULL, spec='{}', state='forgotten', failures=0, losses=0, pack=NULL, worker=NULL, "
    "cause=NULL, reason=NULL, run=NULL, files=NULL, seconds=NULL, stages_s=NULL, started=NULL, finished=NULL, "
    "photos=NULL WHERE id=?"
)
"""What stays of a subject: its place, the number of its attempts, and the GPU-seconds that the run has spent."""
PLACEHOLDER = re.compile(r"\\{\w+\\}")
"""A caption's placeholder after `re.escape`."""
TEXTS = (("subjects", "reason"), ("attempts", "reason"), ("spent", "reason"), ("afterwards", "outcome"))
"""(table, column) of sentences, which may name other subjects than their own."""


@dataclass
class Forgotten:
    """What a forgetting has removed, what its stores did not delete (why, by address), and where copies may be that it
    cannot reach."""

    removed: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)

    def note(self, number: int, what: str) -> None:
        """Note something that was removed, unless there was none of it."""
        if number:
            self.removed.append(f"{what}: {number}")


def forget(out: Path, ids: Sequence[str]) -> Forgotten | None:
    """What was removed of these subjects of a run; None where the driver at work was asked to do it.

    With no ids, a forgetting that was interrupted is ended, and copies that a store kept are tried again. Raises
    DataError for ids that the run does not have, and while a training is at work that takes no requests.
    """
    folder = find_ledger(out)
    fleet = has_ledger(out)
    if not (fleet or (out / "subjects").is_dir() or (out / "shards").is_dir()):
        raise DataError(f"{out}: holds no run; give the folder that was --out of `dbtrain train` or `batch run`")
    with ExitStack() as fence:
        if not fence.enter_context(held(out / LOCK)):
            if not (fleet and is_driven(folder)):
                raise DataError(f"{out}: a training is at work there; stop it (Ctrl-C), then run this again")
            _ask(out, ids)
            return None
        ledger = None
        if fleet:
            fence.callback(Lease(folder).release)
            ledger = fence.enter_context(closing(Ledger(folder)))
        _ask(out, ids, ledger)
        return end_forgetting(out, ledger)


def _ask(out: Path, ids: Sequence[str], ledger: Ledger | None = None) -> None:
    """Note whom to forget, on the disk."""
    index, pending, stones = _index(out), read_pending(out), read_tombstones(out)
    known = set(pending) | _known(out, index, ledger)
    unknown = [name for name in ids if name not in known and name not in stones]
    if unknown:
        raise DataError(f"{out}: its run has no subject {unknown[0]!r}")
    if more := {name: _words(out, index, name) for name in ids if name not in pending}:
        change_pending(out, more)


def _known(out: Path, index: Index, ledger: Ledger | None) -> set[str]:
    """The ids that any part of a run has. ledger: None where none is open; a driver's may be read beside it."""
    names = {*index.subjects, *_read_json(out / "shards" / SKIPPED)}
    if (out / "subjects").is_dir():
        names |= {path.name for path in (out / "subjects").iterdir() if not path.name.startswith(".")}
    if ledger is not None:
        return names | ledger.ids()
    if has_ledger(out):
        with closing(Ledger(find_ledger(out))) as opened:
            return names | opened.ids()
    return names


def _index(out: Path) -> Index:
    folder = out / "shards"
    return Index.load(folder) if (folder / INDEX_NAME).exists() else Index((), ())


def _words(out: Path, index: Index, name: str) -> list[str]:
    """What leads to a subject in a text: its id, its captions, and the names of its photos."""
    entries = [entry for entry in index.entries if entry.subject == name]
    words = {name, *(entry.caption for entry in entries)}
    with suppress(DataError):  # a damaged photo is removed all the same, and nothing can be read of it
        words |= {str(sample.meta.get("source", "")) for sample in read_samples(out / "shards", entries)}
    return sorted(words - {""})


def end_forgetting(out: Path, ledger: Ledger | None) -> Forgotten:
    """What was removed now of all subjects that are to be forgotten. Only for the holder of the run's lock, and of the
    ledger's lease."""
    pending, done = read_pending(out), Forgotten()
    if not pending:
        _delete_copies(out, done)
        return done
    names = sorted(pending)
    done.elsewhere = _elsewhere(out, ledger)
    stones = bury(out, names)
    with _unread(out / REPORT):
        if ledger is not None:
            _erase_rows(ledger, pending, stones, done)
            _withdraw_requests(find_ledger(out) / INBOX, names)
        _remove_samples(out / "shards", names, done)
        for name in names:
            _remove_folder(out, name, done)
        done.note(forget_identifiers(out / REGISTRY, names), f"lines of {REGISTRY}")
        _scrub_texts(out, pending, done)
        _scrub_summary(out, pending, done)
        _remove_pages(out / REPORT, pending, done)
        for place in (out, out / "subjects", out / "logs", out / REPORT, out / REPORT / "subjects"):
            if place.is_dir():
                done.note(len(sweep(place)), f"remains of unfinished writes in {place.name}")
                sync_folder(place)
    _delete_copies(out, done)
    change_pending(out, {}, names)
    return done


@contextmanager
def _unread(report: Path) -> Iterator[None]:
    """Keep the report from being built, if there is one."""
    with ExitStack() as fence:
        if report.is_dir():
            fence.enter_context(held(report / LOCK, wait=True))
        yield


def _erase_rows(ledger: Ledger, pending: Mapping[str, Sequence[str]], stones: Tombstones, done: Forgotten) -> None:
    """Leave tombstones in the ledger, and no erased byte in its file or in its log of changes."""
    erased = 0
    with ledger.commit():
        for name in pending:
            row = ledger.db.execute("SELECT position FROM subjects WHERE id=?", (name,)).fetchone()
            if row is not None:
                ledger.db.execute("DELETE FROM attempts WHERE position=?", tuple(row))
                ledger.db.execute("DELETE FROM afterwards WHERE position=?", tuple(row))
                erased += ledger.db.execute(ERASE, (stones.name(name), name)).rowcount
        matches = _matcher([word for words in pending.values() for word in words])
        for table, column in TEXTS:
            texts = ledger.db.execute(f"SELECT DISTINCT {column} FROM {table} WHERE {column} NOT NULL")  # noqa: S608
            change = f"UPDATE {table} SET {column}='(it named a forgotten subject)' WHERE {column}=?"  # noqa: S608
            ledger.db.executemany(change, [(text,) for (text,) in texts.fetchall() if matches(text)])
    # A deleted row stays in free pages of the file and in the write-ahead log until both are written anew.
    ledger.db.execute("VACUUM")
    busy, *_ = ledger.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise FleetError("ledger: another process reads it, so its log keeps what was erased; end that, and run again")
    done.note(erased, "rows of the ledger")


def _withdraw_requests(inbox: Path, names: Collection[str]) -> None:
    for path in inbox.glob("*.json"):
        asked = json.loads(path.read_text())
        left = [name for name in asked["ids"] or () if name not in names]
        if asked["ids"] is not None and left != asked["ids"]:
            write_file(path, json.dumps({**asked, "ids": left}).encode())


def _remove_samples(folder: Path, names: Sequence[str], done: Forgotten) -> None:
    """Take photos and captions out of the shards. Samples that shared a shard with them move to a new one, each under
    its digest; the index changes in one rename."""
    if not folder.is_dir():
        return
    index = Index((), ())
    if (folder / INDEX_NAME).exists():
        index = Index.load(folder)
        if gone := {entry.subject for entry in index.entries} & set(names):
            before = len(index.entries)
            index = grow_shards((), folder, index, gone)
            done.note(before - len(index.entries), "samples in shards")
    tidy(folder, index)
    skipped = _read_json(folder / SKIPPED)
    matches = _matcher(names)
    left = {name: [reason for reason in reasons if not matches(reason)] or ["(it named a forgotten subject)"]
            for name, reasons in skipped.items() if name not in names}  # fmt: skip
    if left != skipped:
        write_file(folder / SKIPPED, json.dumps(left, indent=1).encode())
        done.note(1, f"entries of {SKIPPED}")


def _remove_folder(out: Path, name: str, done: Forgotten) -> None:
    """Remove a subject's folder: adapter, samples, checkpoints, log, scores, card. The record goes first, so that no
    reader takes the rest for a finished subject; where its uploaded copies are is noted before."""
    folder = out / "subjects" / name
    if folder.is_symlink():
        done.elsewhere.insert(0, f"{folder.resolve()}: {folder.name} was a link to it")
        folder.unlink()
    if not SUBJECT_ID.fullmatch(folder.name) or not folder.is_dir():
        return
    with ExitStack() as fence:
        until = time.monotonic() + WAIT_S
        while not fence.enter_context(held(folder / LOCK)):
            fence.close()
            if time.monotonic() > until:
                raise SubjectTaken(f"{folder}: a process still works on this subject; stop it, then run this again")
            time.sleep(0.05)
        try:
            _note_copies(out, {*_read_copies(out), *uploads_of(folder)})
        except DataError as error:
            done.elsewhere.insert(0, first_line(error))
        files = sum(path.is_file() for path in folder.rglob("*"))
        drop_record(folder)
        shutil.rmtree(folder)
    done.note(files, f"files in {folder.parent.name}/{folder.name}")
    sync_folder(folder.parent)


def _read_copies(out: Path) -> list[str]:
    path = out / COPIES
    return list(json.loads(path.read_text())) if path.exists() else []


def _note_copies(out: Path, addresses: Collection[str]) -> None:
    """Keep which copies are to be deleted; the note of none is removed."""
    path, left = out / COPIES, sorted(addresses)
    if left == _read_copies(out):
        return
    if left:
        write_file(path, json.dumps(left).encode())
    else:
        path.unlink()
        sync_folder(out)


def _delete_copies(out: Path, done: Forgotten) -> None:
    """Delete uploaded copies. Those that a store keeps are tried three times now, and by each later forgetting."""
    noted = left = _read_copies(out)
    for pause_s in (0.0, *PAUSES_S):
        if left:
            time.sleep(pause_s)
        done.refused = {}
        for address in left:
            try:
                delete_copy(address)
            except DataError as error:
                done.refused[address] = first_line(error)
        left = list(done.refused)
    _note_copies(out, left)
    done.note(len(noted) - len(left), "uploaded copies")


def _scrub_texts(out: Path, pending: Mapping[str, Sequence[str]], done: Forgotten) -> None:
    """Take the lines out of logs that lead to a subject."""
    matches = _matcher([word for words in pending.values() for word in words])
    for path in [out / "fleet.jsonl", *sorted((out / "logs").glob("*"))]:
        if path.is_file():
            lines = path.read_bytes().splitlines(keepends=True)
            left = [line for line in lines if not matches(line.decode(errors="replace"))]
            if len(left) < len(lines):
                write_file(path, b"".join(left))
                done.note(len(lines) - len(left), f"lines of {path.relative_to(out)}")


def _scrub_summary(out: Path, pending: Mapping[str, Sequence[str]], done: Forgotten) -> None:
    """Make the table of scores anew from the subjects that are left; remove it where none of them has scores."""
    path = out / RESULT
    if not path.exists():
        return
    from dbtrain.evaluate.summary import write_summary  # loads models' libraries, which a driver does without

    table = _read_json(path)
    failed = {name: reason for name, reason in table.get("failed", {}).items() if name not in pending}
    named_now = set(pending) & {*table.get("failed", {}), *(row["subject"] for row in table.get("by_subject", ()))}
    try:
        write_summary(out, failed, table.get("notes", ()))
    except DataError:
        path.unlink()
    done.note(len(named_now), f"subjects in {RESULT}")


def _remove_pages(report: Path, pending: Mapping[str, Sequence[str]], done: Forgotten) -> None:
    """Remove the subjects' folders of the report, and all pages that name them, which the next build makes anew."""
    matches = _matcher([word for words in pending.values() for word in words])
    for page in sorted((report / "subjects").glob("*/index.html")):
        if page.parent.name not in pending and matches(page.read_text(errors="replace")):
            page.unlink()
    for name in pending:
        if SUBJECT_ID.fullmatch(name) and (folder := report / "subjects" / name).is_dir():
            shutil.rmtree(folder)
            done.note(1, f"pages in {REPORT}")
    state = _read_json(report / ".state.json")
    entries = state.get("subjects", {})
    left = {name: entry for name, entry in entries.items()
            if name not in pending and not matches(json.dumps(entry))}  # fmt: skip
    if left != entries:
        write_file(report / ".state.json", json.dumps({**state, "subjects": left}).encode())
    (report / "index.html").unlink(missing_ok=True)


def _elsewhere(out: Path, ledger: Ledger | None) -> list[str]:
    """Where copies may be that this machine does not reach, or that are the user's own."""
    origin, run = _read_json(out / "run.json"), (ledger.run() if ledger else None) or {}
    settings: dict[str, Any] = json.loads(run.get("config") or "{}")
    manifest = run.get("manifest") or origin.get("manifest")
    said = [f"{manifest}: the manifest's row and its photos are yours, and are not changed"] if manifest else []
    said += [f"{place}: {what}" for place, what in (
        (settings.get("data", {}).get("shards"), "shards that the run only reads"),
        (settings.get("identifier", {}).get("registry"), "a registry of identifiers that runs share"),
    ) if place]  # fmt: skip
    said += [f"{name}: what was sent there" for name in ("wandb", "trackio") if settings.get("track", {}).get(name)]
    beyond = "exported adapters, images drawn elsewhere, repositories of a hub, and backups or snapshots of disks"
    return [*said, beyond]


def _matcher(words: Collection[str]) -> Any:
    """A function: whether a text holds any of these words, as they are or as JSON writes them. A placeholder of a
    caption, such as {identifier}, stands for any text."""
    forms = {form for word in words for form in (word, json.dumps(word)[1:-1])}
    pattern = "|".join(PLACEHOLDER.sub(".{1,80}?", re.escape(form)) for form in sorted(forms, key=len, reverse=True))
    return re.compile(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])").search


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file, or no object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def told(out: Path, done: Forgotten) -> list[str]:
    """What a person is told of a forgetting, a line each."""
    removed = [f"removed: {line}" for line in done.removed] or [f"{named(out.name)}: nothing was left to remove"]
    refused = [f"{why}; `dbtrain forget --out {out}` tries it again" for why in done.refused.values()]
    return [*removed, *refused, *(f"a copy may still be in: {line}" for line in done.elsewhere)]
