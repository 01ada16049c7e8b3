"""The build: find what changed since the last one, make those pages, then the run's page; all by atomic replacement.

A page is made again when its digest changes: files of the subject's folder by size and time, the digests of its photos,
its row of the ledger, the run's recipe, and the code of the report. Thumbnails are named after what they show.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from dbtrain.data.index import Entry
from dbtrain.errors import DataError, DbtrainError
from dbtrain.machine import cores
from dbtrain.report.facts import Facts, read_facts, row
from dbtrain.report.pages import ASSETS, OVER, TEMPLATES, View, index_page, subject_page, version
from dbtrain.report.pictures import Thumbnails, put
from dbtrain.report.reading import (
    CONFIG,
    EVALUATION,
    RECORD,
    RUN_BYTES,
    Stamp,
    read_object,
    read_text,
    settings,
    stamps,
    text,
)
from dbtrain.report.sheets import covers, evaluated, load_index, photos, strips
from dbtrain.storage.atomic import LOCK, held, write_file
from dbtrain.values import SUBJECT_ID

FOLDER, SUBJECTS, INDEX, STATE, ORIGIN = "report", "subjects", "index.html", ".state.json", "run.json"
ALONE = 64
"""Pages up to which no helper processes are started: they need about as long to begin."""
MAJORITY = 64
"""Distinct recipes of which the run's common one is found; a run has few, or one a subject."""


@dataclass(frozen=True)
class Built:
    """The run's page, the number of subjects, pages made and left, and whether the run has ended."""

    index: Path
    subjects: int
    made: int
    kept: int
    over: bool
    seconds: float


@dataclass(frozen=True)
class Job:
    """One page to make."""

    subject: str
    digest: str
    files: list[Stamp]
    ledger: Mapping[str, Any]
    photos: tuple[Entry, ...]


@dataclass(frozen=True)
class Ledger:
    """The fleet's row of each subject, and its count of retries by cause."""

    rows: Mapping[str, Mapping[str, Any]]
    retries: Mapping[str, int]


def build(run: Path) -> Path:
    """The index.html of a run's report, made or brought up to date."""
    return rebuild(run).index


def rebuild(
    run: Path,
    *,
    refresh_s: int | None = None,
    price: float | None = None,
    fresh: bool = False,
    processes: int | None = None,
) -> Built:
    """What was built: the report of a run folder, with only those pages made anew whose inputs changed.

    `refresh_s` lets pages of an ongoing run load themselves again; `price` is that of a device hour; `fresh` makes
    everything anew. Raises DataError if the folder holds no run, or if another process builds its report.
    """
    begin = time.perf_counter()
    ledger = read_ledger(run)
    if ledger is None and not (run / SUBJECTS).is_dir():
        raise DataError(
            f"{run}: holds no run (neither subjects/ nor ledger.sqlite); "
            "give the folder that was --out of `dbtrain train` or `dbtrain batch run`"
        )
    out = own_folder(run / FOLDER)
    own_folder(out / SUBJECTS)
    with held(out / ".lock") as ours:
        if not ours:
            raise DataError(f"{out}: another process builds this report; wait for it, or stop its --watch")
        built = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        view = View(str(run), built, refresh_s, price, read_object(run / ORIGIN, []))
        return _rebuild(run, out, view, ledger, fresh, processes or cores(), begin)


def _rebuild(
    run: Path, out: Path, view: View, ledger: Ledger | None, fresh: bool, processes: int, begin: float
) -> Built:
    notes: list[str] = []
    told = ledger.rows if ledger else {}
    linked = {name for name in told if (run / SUBJECTS / name).is_symlink()}
    notes += [f"{name} is left out: {SUBJECTS}/{name} is a link" for name in sorted(linked)]
    known = sorted({*subject_folders(run), *told} - linked)
    before, state = _state(out)
    state = {} if fresh else state
    common = common_settings(read_text(run / SUBJECTS / name / CONFIG, []) for name in known)
    jobs = list(_jobs(run, known, told, view, common, notes))
    stale = [job for job in jobs if not _is_current(out, state.get(job.subject), job.digest)]
    for name in ASSETS:
        put(out / name, (TEMPLATES / name).read_bytes())
    made = dict(_make(stale, partial(make_page, run=run, view=view, common=common, fresh=fresh), processes))
    entries = {job.subject: made.get(job.subject) or state[job.subject] for job in jobs}
    for name in before & set(_folders(out / SUBJECTS)) - set(known):
        shutil.rmtree(out / SUBJECTS / name)
    rows = [entries[name]["row"] for name in known]
    notes += [f"{name}: its page could not be made: {why}" for name in known if (why := entries[name].get("failed"))]
    evaluation = read_object(run / EVALUATION, notes, RUN_BYTES)
    over = not is_worked_on(run) and (ledger is None or all(each["state"] in OVER for each in rows))
    page = index_page(view, rows, ledger.retries if ledger else None, evaluation, common, notes)
    if made:
        os.sync()  # once for all pages, before anything says that they are there
    write_file(out / STATE, json.dumps({"version": version(), "subjects": entries}).encode())
    write_file(out / INDEX, page.encode("utf-8", "replace"))
    return Built(out / INDEX, len(jobs), len(stale), len(jobs) - len(stale), over, time.perf_counter() - begin)


def own_folder(folder: Path) -> Path:
    """The folder, made if it is not there. Raises DataError for a link or a file in its place: the report writes and
    deletes in it, and behind a link may be another run."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DataError(f"{folder}: is a link or a file, want a folder that the report can make; move it away")
    folder.mkdir(exist_ok=True)
    return folder


def is_worked_on(run: Path) -> bool:
    """Whether a training or a fleet's driver holds the run; until it leaves, it may draw and score what is trained."""
    if not (run / LOCK).exists():
        return False
    try:
        with held(run / LOCK) as free:
            return not free
    except PermissionError:  # another user's run: it is shown as it is
        return False


def read_ledger(run: Path) -> Ledger | None:
    """What the fleet's ledger says of a run, or None for a run without one."""
    from dbtrain.fleet.ledger import NAME, find_ledger

    if not (find_ledger(run) / NAME).exists():
        return None
    from dbtrain.fleet.status import read_rows, summarize_run

    rows = {str(each["subject"]): each for each in read_rows(run) if SUBJECT_ID.fullmatch(str(each["subject"]))}
    return Ledger(rows, summarize_run(run)["retries"])


def subject_folders(run: Path) -> list[str]:
    """The ids in a run's `subjects/`; anything that is no id, or no folder of its own, is passed over."""
    return _folders(run / SUBJECTS)


def _folders(parent: Path) -> list[str]:
    try:
        with os.scandir(parent) as entries:
            return [
                each.name for each in entries if SUBJECT_ID.fullmatch(each.name) and each.is_dir(follow_symlinks=False)
            ]
    except FileNotFoundError:
        return []


def common_settings(texts: Iterable[str]) -> dict[str, Any]:
    """The run's recipe: for each setting the value that most subjects have."""
    found = Counter(filter(None, texts)).most_common(MAJORITY)
    votes: dict[str, Counter[str]] = {}
    for recipe, count in found:
        for key, value in settings(recipe).items():
            votes.setdefault(key, Counter())[json.dumps(value)] += count
    return {key: json.loads(values.most_common(1)[0][0]) for key, values in votes.items()}


def _jobs(
    run: Path, known: list[str], ledger: Mapping[str, Any], view: View, common: Mapping[str, Any], notes: list[str]
) -> Iterator[Job]:
    index = load_index(run / "shards", notes)
    shared = [version(), view.run, view.origin, common, notes]
    base = hashlib.sha256(json.dumps(shared, sort_keys=True).encode())
    for name in known:
        folder = run / SUBJECTS / name
        files, rows = stamps(folder), index.entries_of(name) if index else ()
        own = ledger.get(name, {})
        state = own.get("state") or ("finished" if any(path == RECORD for path, _, _ in files) else "unfinished")
        ongoing = None if state in OVER else view.refresh_s
        digest = base.copy()
        digest.update(
            json.dumps(
                [files, [each.sha256 for each in rows], own, newest_checkpoint(folder), ongoing], default=str
            ).encode()
        )
        yield Job(name, digest.hexdigest()[:32], files, own, rows)


def newest_checkpoint(folder: Path) -> str | None:
    """The name of a subject's last checkpoint folder, or None."""
    names = [name for name in _folders(folder / "checkpoints") if name.startswith("step-")]
    return max(names, default=None)


def _state(out: Path) -> tuple[set[str], dict[str, Any]]:
    """Subjects that the last build made a page of, and what it knew of each: {"digest", "row"}, which is nothing if
    another version of the report wrote it."""
    state = read_object(out / STATE, [], RUN_BYTES)
    subjects = state.get("subjects")
    subjects = subjects if isinstance(subjects, dict) else {}
    return set(subjects), subjects if state.get("version") == version() else {}


def _is_current(out: Path, entry: Mapping[str, Any] | None, digest: str) -> bool:
    return entry is not None and entry["digest"] == digest and (out / SUBJECTS / entry["row"]["id"] / INDEX).exists()


def _make(
    jobs: list[Job], make: Callable[[Job], dict[str, Any]], processes: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(subject, entry) of each page made; many pages on all processors."""
    if len(jobs) <= ALONE or processes == 1:
        yield from ((job.subject, make(job)) for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from zip((job.subject for job in jobs), pool.map(make, jobs, chunksize=32))


def make_page(job: Job, run: Path, view: View, common: Mapping[str, Any], fresh: bool) -> dict[str, Any]:
    """{"digest", "row"} of a subject, after its thumbnails and its page were written.

    Whatever its files hold, the other pages are made: what they make of this one is then told in place of it, and under
    "failed".
    """
    out = own_folder(run / FOLDER / SUBJECTS / job.subject)
    try:
        return _made_page(job, run / SUBJECTS / job.subject, run, out, view, common, fresh)
    except (DbtrainError, OSError):
        raise
    except Exception as error:
        failed = f"{type(error).__name__}: {text(str(error), 300)}"
        notes = [f"its files make no page: {failed}"]
        facts = Facts(job.subject, {}, {"state": job.ledger.get("state")}, {}, [], {}, notes)
        nothing = {"photos": [], "strips": {"columns": [], "prompts": []}, "evaluated": []}
        put(out / INDEX, subject_page(view, facts, nothing, common, None).encode("utf-8", "replace"))
        return {"digest": job.digest, "row": row(facts, {}), "failed": failed}


def _made_page(
    job: Job, folder: Path, run: Path, out: Path, view: View, common: Mapping[str, Any], fresh: bool
) -> dict[str, Any]:
    facts = read_facts(folder, job.subject, job.ledger)
    thumbnails = Thumbnails(out, fresh)
    shown = photos(run / "shards", job.photos, thumbnails, facts.notes)
    sheets = strips(folder, job.files, facts, thumbnails)
    judged = evaluated(folder, facts, thumbnails)
    pictures = {"photos": shown, "strips": sheets, "evaluated": judged}
    put(out / INDEX, subject_page(view, facts, pictures, common, newest_checkpoint(folder)).encode("utf-8", "replace"))
    thumbnails.sweep()
    return {"digest": job.digest, "row": row(facts, covers(shown, sheets, judged))}
