"""The build: find which pages changed since the last build, make those, then the run's page.

A page is made again when its digest changes. The digest covers the subject's files by size and time, the digests of its
photos, its row of the ledger, the run's recipe, and the code of the report. Every file is replaced by a rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
from dbtrain.report.reading import CONFIG, EVALUATION, RUN_BYTES, Stamp, read_object, read_text, settings, stamps, text
from dbtrain.report.sheets import NO_PICTURES, covers, evaluated, load_index, photos, strips
from dbtrain.results.record import RECORD
from dbtrain.storage.atomic import LOCK, held, write_file
from dbtrain.values import SUBJECT_ID

FOLDER, SUBJECTS, INDEX, STATE, ORIGIN = "report", "subjects", "index.html", ".state.json", "run.json"
ALONE = 64
"""Largest number of pages that are made without helper processes, which take about as long to start."""
MAJORITY = 64
"""How many distinct recipes are counted to find the run's common one. A run has few recipes, or one a subject."""


@dataclass(frozen=True)
class Built:
    """The path of the run's page, the numbers of subjects, pages made and pages kept, and whether the run is over."""

    index: Path
    subjects: int
    made: int
    kept: int
    over: bool
    seconds: float


@dataclass(frozen=True)
class Build:
    """What all pages of one build share: the run's folder, the view, the run's recipe, and whether all is made anew."""

    run: Path
    view: View
    common: Mapping[str, Any]
    fresh: bool


@dataclass(frozen=True)
class PageJob:
    """One page to make: the subject, the page's digest, the subject's files, its row of the ledger, and its photos."""

    subject: str
    digest: str
    files: list[Stamp]
    ledger: Mapping[str, Any]
    photos: tuple[Entry, ...]


Ledger = tuple[Mapping[str, Mapping[str, Any]], Mapping[str, int] | None]
"""(the fleet's row of each subject, number of retries by cause). A run without a ledger has no rows and None."""


def build(run: Path) -> Path:
    """The path of the index.html of a run's report, which is made or brought up to date."""
    return rebuild(run).index


def rebuild(
    run: Path,
    *,
    refresh_s: int | None = None,
    price: float | None = None,
    fresh: bool = False,
    processes: int | None = None,
) -> Built:
    """What was built of a run's report: only pages whose inputs changed are made.

    refresh_s: seconds after which pages of an ongoing run reload; None for never. price: of a device hour. fresh: make
    every page anew. processes: None is one for each core. Raises DataError if the folder holds no run, or if another
    process builds its report.
    """
    begin = time.perf_counter()
    ledger = read_ledger(run)
    if ledger[1] is None and not (run / SUBJECTS).is_dir():
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


def _rebuild(run: Path, out: Path, view: View, ledger: Ledger, fresh: bool, processes: int, begin: float) -> Built:
    ledger_rows, retries = ledger
    linked = {name for name in ledger_rows if (run / SUBJECTS / name).is_symlink()}
    notes = [f"{name} is left out: {SUBJECTS}/{name} is a link" for name in sorted(linked)]
    known = sorted({*subject_ids(run / SUBJECTS), *ledger_rows} - linked)
    common = common_settings(read_text(run / SUBJECTS / name / CONFIG, []) for name in known)
    share = Build(run, view, common, fresh)
    jobs = list(_jobs(share, known, ledger_rows, notes))
    before, entries = _state(out)
    current = {
        job.subject: entry
        for job in ([] if fresh else jobs)
        if (entry := entries.get(job.subject)) and entry["digest"] == job.digest
        if (out / SUBJECTS / job.subject / INDEX).exists()
    }
    stale = [job for job in jobs if job.subject not in current]
    for name in ASSETS:
        put(out / name, (TEMPLATES / name).read_bytes())
    made = dict(_make(stale, share, processes))
    entries = {name: made.get(name) or current[name] for name in known}
    for name in before & set(subject_ids(out / SUBJECTS)) - set(known):
        shutil.rmtree(out / SUBJECTS / name)
    rows = [entries[name]["row"] for name in known]
    notes += [f"{name}: its page could not be made: {why}" for name in known if (why := entries[name].get("failed"))]
    evaluation = read_object(run / EVALUATION, notes, RUN_BYTES)
    over = not is_worked_on(run) and (retries is None or all(row["state"] in OVER for row in rows))
    page = index_page(view, rows, retries, evaluation, common, notes)
    if stale:
        os.sync()  # once for all pages, before a file says that they exist
    write_file(out / STATE, json.dumps({"version": version(), "subjects": entries}).encode())
    write_file(out / INDEX, page.encode("utf-8", "replace"))
    return Built(out / INDEX, len(jobs), len(stale), len(current), over, time.perf_counter() - begin)


def own_folder(folder: Path) -> Path:
    """The folder, made if it does not exist. Raises DataError for a link or a file in its place: the report writes and
    deletes in the folder, and a link may lead to another run."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DataError(f"{folder}: is a link or a file, want a folder that the report can make; move it away")
    folder.mkdir(exist_ok=True)
    return folder


def is_worked_on(run: Path) -> bool:
    """Whether a training or a fleet's driver holds the run's lock. As long as it does, it may still draw and score."""
    if not (run / LOCK).exists():
        return False
    try:
        with held(run / LOCK) as free:
            return not free
    except PermissionError:  # the run of another user, whose lock cannot be tried
        return False


def read_ledger(run: Path) -> Ledger:
    """The rows and retries in the fleet's ledger of a run."""
    from dbtrain.fleet.lease import has_ledger

    if not has_ledger(run):
        return {}, None
    from dbtrain.fleet.status import read_rows, summarize_run

    rows = {str(row["subject"]): row for row in read_rows(run) if SUBJECT_ID.fullmatch(str(row["subject"]))}
    return rows, summarize_run(run)["retries"]


def subject_ids(parent: Path) -> list[str]:
    """The names of the folders in `parent` that are ids of subjects; links and other names are left out."""
    try:
        with os.scandir(parent) as entries:
            folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return [name for name in folders if SUBJECT_ID.fullmatch(name)]


def common_settings(texts: Iterable[str]) -> dict[str, Any]:
    """The run's recipe: for each setting the value that most subjects have."""
    votes: dict[str, Counter[str]] = {}
    for recipe, count in Counter(filter(None, texts)).most_common(MAJORITY):
        for key, value in settings(recipe).items():
            votes.setdefault(key, Counter())[json.dumps(value)] += count
    return {key: json.loads(values.most_common(1)[0][0]) for key, values in votes.items()}


def _jobs(build: Build, known: list[str], ledger: Mapping[str, Any], notes: list[str]) -> Iterator[PageJob]:
    index = load_index(build.run / "shards", notes)
    shared = [version(), build.view.run, build.view.origin, build.common, notes]
    base = hashlib.sha256(json.dumps(shared, sort_keys=True).encode())
    for name in known:
        folder = build.run / SUBJECTS / name
        files, photo_rows = stamps(folder), index.entries_of(name) if index else ()
        own = ledger.get(name, {})
        state = own.get("state") or ("finished" if any(path == RECORD for path, _, _ in files) else "unfinished")
        refresh_s = None if state in OVER else build.view.refresh_s
        inputs = [files, [row.sha256 for row in photo_rows], own, newest_checkpoint(folder), refresh_s]
        digest = base.copy()
        digest.update(json.dumps(inputs, default=str).encode())
        yield PageJob(name, digest.hexdigest()[:32], files, own, photo_rows)


def newest_checkpoint(folder: Path) -> str | None:
    """The name of a subject's last checkpoint folder, or None."""
    return max((name for name in subject_ids(folder / "checkpoints") if name.startswith("step-")), default=None)


def _state(out: Path) -> tuple[set[str], dict[str, Any]]:
    """(subjects that the last build made a page of, their entries as `make_page` returned them).

    There are no entries if another version of the report wrote them.
    """
    state = read_object(out / STATE, [], RUN_BYTES)
    subjects = state.get("subjects")
    entries = subjects if isinstance(subjects, dict) else {}
    return set(entries), entries if state.get("version") == version() else {}


def _make(jobs: list[PageJob], build: Build, processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(subject, entry) of each page made. Many pages are made by several processes."""
    make = partial(make_page, build=build)
    if len(jobs) <= ALONE or processes == 1:
        yield from ((job.subject, make(job)) for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from zip((job.subject for job in jobs), pool.map(make, jobs, chunksize=32))


def make_page(job: PageJob, build: Build) -> dict[str, Any]:
    """The subject's entry {"digest", "row"}, after its thumbnails and its page were written.

    Files of a subject may make its page fail in any way, and the other pages must still be made. Then the page says
    why, and so does "failed" in the entry.
    """
    folder, out = build.run / SUBJECTS / job.subject, own_folder(build.run / FOLDER / SUBJECTS / job.subject)
    thumbnails = Thumbnails(out, build.fresh)
    try:
        facts = read_facts(folder, job.subject, job.ledger)
        pictures = {
            "photos": photos(build.run / "shards", job.photos, thumbnails, facts.notes),
            "strips": strips(folder, job.files, facts, thumbnails),
            "evaluated": evaluated(folder, facts, thumbnails),
        }
        entry = _put_page(job, build, out, facts, pictures, newest_checkpoint(folder))
    except (DbtrainError, OSError):
        raise
    except Exception as error:
        failed = f"{type(error).__name__}: {text(str(error), 300)}"
        notes = [f"its files make no page: {failed}"]
        facts = Facts(job.subject, {}, {"state": job.ledger.get("state")}, {}, [], {}, notes)
        return {**_put_page(job, build, out, facts, NO_PICTURES, None), "failed": failed}
    thumbnails.sweep()
    return entry


def _put_page(
    job: PageJob, build: Build, out: Path, facts: Facts, pictures: Mapping[str, Any], checkpoint: str | None
) -> dict[str, Any]:
    page = subject_page(build.view, facts, pictures, build.common, checkpoint)
    put(out / INDEX, page.encode("utf-8", "replace"))
    return {"digest": job.digest, "row": row(facts, covers(pictures))}
