"""record.json: the file that marks a subject as finished, with the digests of all files that training wrote for it.

It is written last. The files are compared with it wherever they are used, and before a subject counts as done.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dbtrain.errors import DataError
from dbtrain.results.identity import Identity
from dbtrain.storage.atomic import file_digest, sync_folder, write_file

RECORD = "record.json"
LAST_SHEET = "samples"
SHEET = f"{LAST_SHEET}.png"
NEEDED = {**dict.fromkeys(("subject", "class", "identifier", "run", "base", "base_digest"), str), "files": dict}
"""Keys that every record holds, with the types of their values."""
QUICK_BYTES = 2**30
"""Up to this total size digests decide whether a subject is done; above it only file sizes."""


def write_record(
    folder: Path,
    record: dict[str, Any],
    artefacts: Sequence[Path],
    place: Path | None = None,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Write record.json: the record, sizes and digests of the artefacts, and digests of the last sheet's images.

    It is the last file of a finished subject. beside: digests of files that lie already where the result will be, by
    their names in `place`: those of further stages.
    """
    names = {path.relative_to(folder).as_posix(): path for path in artefacts}
    files = {name: file_digest(path) for name, path in names.items()} | dict(beside or {})
    names |= {name: (place or folder) / name for name in beside or ()}
    content = {**record, "files": files, "sizes": {name: path.stat().st_size for name, path in names.items()}}
    if SHEET in files:
        drawn = sorted((folder / "samples" / "samples").glob("*.png"))
        content["samples"] = {path.name: file_digest(path) for path in drawn}
    write_file(folder / RECORD, json.dumps(content, indent=1).encode())


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished subject. None if there is none. Raises DataError for a damaged record."""
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in NEEDED.items()):
        raise DataError(f"{path}: is damaged; remove it and run the same training again, which publishes anew")
    return record


def stage_seconds(record: Mapping[str, Any]) -> dict[str, Any]:
    """A subject's seconds by what they were spent on, those of a stage that enlarges told apart by its name; what there
    is of them in a record that may be damaged."""
    own, stages = record.get("stages_s"), record.get("stages")
    spent = dict(own) if isinstance(own, dict) else {}
    for stage in stages if isinstance(stages, list) else ():
        if isinstance(stage, dict) and isinstance(stage.get("stages_s"), dict):
            spent |= {f"{stage.get('folder')}: {name}": seconds for name, seconds in stage["stages_s"].items()}
    return spent


def record_identity(record: dict[str, Any]) -> Identity:
    """The training that a record is of."""
    return Identity.read(record["run"], record.get("about"))


def looks_finished(folder: Path) -> bool:
    """Whether a folder has a record, and all files of that record with the right sizes. Digests are not compared."""
    try:
        record = read_record(folder)
    except DataError:
        return False
    return record is not None and file_problem(folder, record, most_bytes=0) is None


def drop_record(folder: Path) -> None:
    """Remove a subject's record, so that the same training goes on with the subject."""
    (folder / RECORD).unlink(missing_ok=True)
    sync_folder(folder)


def finished_record(folder: Path) -> dict[str, Any]:
    """The record of a finished subject whose files all agree with it.

    Raises DataError, which names the file, for a folder that holds no such subject.
    """
    record = read_record(folder)
    if record is None:
        raise DataError(f"{folder}: holds no finished subject (no record.json); give a folder under OUT/subjects/")
    _refuse(folder, record, record["files"])
    return record


def refuse_changed(path: Path) -> None:
    """Raise DataError if a file differs from the record beside it. A file that no record names passes."""
    record = read_record(path.parent)
    if record is not None and path.name in record["files"]:
        _refuse(path.parent, record, {path.name: record["files"][path.name]})


def _refuse(folder: Path, record: dict[str, Any], files: Mapping[str, str]) -> None:
    problem = file_problem(folder, {**record, "files": files})
    if problem is not None:
        seen = file_problem(folder, record, QUICK_BYTES) is not None
        first = "" if seen else f"remove {RECORD} there and "
        raise DataError(f"{problem}; {first}run the same training again, which mends it")


def file_problem(folder: Path, record: dict[str, Any], most_bytes: float = math.inf) -> str | None:
    """The first file of a finished subject that differs from its record, and how. None if no file differs.

    Names and sizes are compared first (records of old versions hold no sizes), then digests, unless the files have
    more than `most_bytes` together.
    """
    sizes, total = record.get("sizes"), 0
    for name in record["files"]:
        size = _size(folder, name)
        want = sizes.get(name, size) if isinstance(sizes, dict) else size
        if size is None:
            return f"{folder / name}: is missing, and {RECORD} names it"
        if size != want:
            return f"{folder / name}: has {size} bytes, {RECORD} says {want}"
        total += size
    for name, want in record["files"].items() if total <= most_bytes else ():
        digest = file_digest(folder / name)
        if digest != want:
            return f"{folder / name}: has the sha256 {digest[:16]}..., {RECORD} says {str(want)[:16]}..."
    return None


def _size(folder: Path, name: str) -> int | None:
    """Bytes of a regular file within a folder; None if there is none of that name."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        return None
    try:
        status = (folder / name).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
