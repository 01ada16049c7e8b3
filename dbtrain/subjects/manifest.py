"""The manifest: which subjects there are, what class each is of, and where its photos lie.

Columns: `subject`, `class`, `images` (a folder, a glob, or a list; relative to the manifest's folder), and optionally
`caption`, `identifier`, `seed`, `steps`, `lr`, `rank`, `prior_weight`. An empty cell means that the run's configuration
holds. In CSV a list is separated by semicolons. All defects are found in one pass; nothing is ever written.
"""

import difflib
import glob
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbtrain.data.images import SUFFIXES
from dbtrain.errors import DataError, shown
from dbtrain.subjects.finding import Finding, refuse
from dbtrain.subjects.rows import Row, read_rows
from dbtrain.values import SUBJECT_ID, Subject

MAX_CAPTION = 1000
"""Longest caption, in characters."""
MAX_NAME = 100
"""Longest class noun or identifier, in characters."""
PLACEHOLDERS = {"identifier", "class"}
REQUIRED = ("subject", "class", "images")
FOREIGN = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl", ".jp2", ".dng", ".cr2", ".nef", ".arw")
"""Endings of pictures that dbtrain does not read: called out in a folder instead of silently left out."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
LONE = re.compile(r"[\ud800-\udfff]")
"""Half of a pair that stands for one character, which JSON can spell alone: no text, and no encoder takes it."""


class _CellError(Exception):
    """A cell's defect: (what, want, do)."""


def read_manifest(path: Path, photos: bool = True) -> list[Subject]:
    """The subjects of a manifest, in its order; a DataError lists all defects, one a line."""
    subjects, findings = scan_manifest(path, photos)
    refuse(findings)
    return subjects


def scan_manifest(path: Path, photos: bool = True) -> tuple[list[Subject], list[Finding]]:
    """(sound subjects, defects) of a manifest; DataError only if the file as a whole cannot be read.

    photos: False leaves the column `images` out, for subjects whose photos lie in shards already.
    """
    path = Path(path)
    rows = read_rows(path)
    subjects: list[Subject] = []
    findings: list[Finding] = []
    checked = [(row, *_check_row(row, path.resolve().parent, photos)) for row in rows]
    clashes = _clashes([(row.place, cells["subject"]) for row, cells, _ in checked if "subject" in cells])
    for row, cells, defects in checked:
        name = cells.get("subject", "")
        defects += clashes.get(row.place, [])
        findings += [Finding(name, f"{path}:{row.place}", what, remedy) for what, remedy in defects]
        if not defects:
            subjects.append(_subject(cells))
    if not rows:
        findings.append(Finding("", f"{path}", "has no rows", f"write one row a subject with {', '.join(REQUIRED)}"))
    return subjects, findings


def subject_from_folder(folder: Path, class_noun: str) -> Subject:
    """A subject made of the photos in one folder, with the folder's name (made safe) as its id."""
    folder = Path(folder)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-_")[:64] or "subject"
    try:
        return Subject(name, _phrase(class_noun, folder), tuple(_photos(str(folder.resolve()), folder)))
    except _CellError as bad:
        what, want, remedy = bad.args
        raise DataError(f"{folder}: {what}, want {want}; {remedy}") from bad


def natural_key(text: str) -> tuple:
    """A sort key by which `photo2` comes before `photo10`; ties are broken by the text itself."""
    parts = re.split(r"([0-9]+)", text.casefold())
    return tuple((int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in parts), text


def _check_row(row: Row, folder: Path, photos: bool) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(values of the sound cells, defects as (what, remedy)) of one row."""
    defects = [(what, remedy) for what, remedy in (problem.split("; ", 1) for problem in row.problems)]
    if row.problems and not row.cells:
        return {}, defects
    defects += [(f"column {shown(name)}: is unknown", _hint(name)) for name in row.cells if name not in COLUMNS]
    values = {}
    for column, check in COLUMNS.items():
        if column == "images" and not photos:
            values[column] = ()
            continue
        cell = row.cells.get(column)
        try:
            if cell is not None and cell != []:
                values[column] = check(cell, folder)
            elif column in REQUIRED:
                raise _CellError("got nothing", *WANTED[column])
        except _CellError as bad:
            what, want, remedy = bad.args
            defects.append((f"column {column}: {what}, want {want}", remedy))
    if "caption" in values and not _names_subject(values):
        defects.append(
            (
                "column caption: does not name the subject, want {identifier} in it",
                "write {identifier} where the subject's rare name shall stand",
            )
        )
    return values, defects


def _names_subject(values: dict[str, Any]) -> bool:
    identifier = values.get("identifier")
    return "{identifier}" in values["caption"] or (identifier is not None and identifier in values["caption"])


def _clashes(ids: list[tuple[int, str]]) -> dict[int, list[tuple[str, str]]]:
    """Defects by row of ids that several rows have, exactly or but for the case of their letters.

    Of one id the rows after the first are named; ids that differ by case only are different subjects, and all are.
    """
    seen: dict[str, dict[str, int]] = {}
    found: dict[int, list[tuple[str, str]]] = {}
    remedy = "give each subject an id of its own"
    for place, name in ids:
        firsts = seen.setdefault(name.casefold(), {})
        if name in firsts:
            found[place] = [(f"column subject: {shown(name)} repeats row {firsts[name]}", remedy)]
        firsts.setdefault(name, place)
    for firsts in seen.values():
        for name, place in firsts.items():
            other = next((one for one in firsts if one != name), None)
            if other is not None:
                what = f"column subject: {shown(name)} differs only by case from {shown(other)} of row {firsts[other]}"
                found[place] = [(what, remedy)]
    return found


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"the columns are {', '.join(COLUMNS)}"


def _subject(values: dict[str, Any]) -> Subject:
    names = {"subject": "id", "class": "class_noun"}
    return Subject(**{names.get(column, column): value for column, value in values.items()})


def _id(cell: Any, _: Path) -> str:
    text = _string(cell)
    if not SUBJECT_ID.fullmatch(text):
        raise _CellError(f"got {shown(text)}", *WANTED["subject"])
    return text


def _phrase(cell: Any, _: Path) -> str:
    text = _string(cell)
    if not text.strip() or len(text) > MAX_NAME or CONTROL.search(text) or set("{}") & set(text):
        raise _CellError(f"got {shown(text)}", *WANTED["class"])
    return text.strip()


def _word(cell: Any, _: Path) -> str:
    text = _string(cell)
    if len(text) > MAX_NAME or CONTROL.search(text) or set("{} ") & set(text):
        raise _CellError(
            f"got {shown(text)}",
            "one rare word without spaces or braces",
            "see `dbtrain identifiers`, or leave it empty",
        )
    return text


def _caption(cell: Any, _: Path) -> str:
    text = _string(cell)
    if len(text) > MAX_CAPTION:
        raise _CellError(
            f"got {len(text)} characters", f"at most {MAX_CAPTION}", "shorten it; text encoders read about 77 tokens"
        )
    if CONTROL.search(text):
        raise _CellError(f"got a control character in {shown(text)}", "one line of plain text", "take it out")
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError as error:
        raise _CellError(
            f"got {shown(text)} ({error})", "paired braces", "write {{ and }} for braces themselves"
        ) from error
    unknown = [
        name for _, name, style, change in fields if name is not None and (name not in PLACEHOLDERS or style or change)
    ]
    if unknown:
        raise _CellError(f"got the placeholder {shown(unknown[0])}", "{identifier} or {class}", "correct its name")
    return text


def _string(cell: Any) -> str:
    if isinstance(cell, bool) or not isinstance(cell, (str, int)):
        raise _CellError(f"got {shown(cell)}", "text", "put quotes around it, or leave it empty")
    text = str(cell)
    if LONE.search(text):
        raise _CellError(f"got {shown(text)}, with half a character", "Unicode text", "write that character again")
    return text


def _whole(low: int, high: int) -> Callable[[Any, Path], int]:
    def check(cell: Any, _: Path) -> int:
        try:
            value = int(cell) if isinstance(cell, str) else cell
            if isinstance(value, bool) or int(value) != value or not low <= value < high:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            bound = f"to {high - 1}" if high < 2**62 else "up"
            raise _CellError(
                f"got {shown(cell)}", f"a whole number from {low} {bound}", "correct it, or leave it empty"
            ) from None
        return int(value)

    return check


def _rate(cell: Any, _: Path) -> float:
    try:
        value = float(cell) if isinstance(cell, str) else cell
        if not 0 < value < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise _CellError(
            f"got {shown(cell)}", "a number between 0 and 1, such as 1e-4", "correct it, or leave it empty"
        ) from None
    return float(value)


def _factor(cell: Any, _: Path) -> float:
    try:
        value = float(cell) if isinstance(cell, str) else cell
        if isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError
    except (TypeError, ValueError):
        raise _CellError(f"got {shown(cell)}", "a number above 0", "correct it, or leave it empty") from None
    return float(value)


def _images(cell: Any, folder: Path) -> tuple[Path, ...]:
    cells = cell if isinstance(cell, list) else [cell]
    if not all(isinstance(part, str) and part and "\0" not in part for part in cells):
        raise _CellError(f"got {shown(cell)}", *WANTED["images"])
    try:
        found = [photo for part in cells for photo in _photos(part, folder)]
    except OSError as error:
        raise _CellError(f"got {shown(cell)} ({error.strerror})", *WANTED["images"]) from error
    twice = [photo for photo in found if found.count(photo) > 1]
    if twice:
        raise _CellError(f"names {twice[0]} twice", "each photo once", "take one of the two out")
    return tuple(sorted(found, key=lambda photo: natural_key(str(photo))))


def _photos(text: str, folder: Path) -> list[Path]:
    """The photos that a cell names: what exists under that very name, else a semicolon list, else a glob."""
    path = folder / text
    if path.is_dir():
        listed = sorted(
            (entry for entry in path.iterdir() if not entry.name.startswith(".")), key=lambda e: natural_key(e.name)
        )
        return _only_photos(listed, f"the folder {shown(text)}")
    if path.exists() or path.is_symlink():
        return [_photo(path)]
    if ";" in text:
        return [photo for part in text.split(";") if part.strip() for photo in _photos(part.strip(), folder)]
    if glob.has_magic(text):
        names = sorted(glob.glob(text, root_dir=folder, recursive=True), key=natural_key)
        return _only_photos([folder / name for name in names], f"the pattern {shown(text)}")
    raise _CellError(f"got {shown(text)}, which does not exist", *WANTED["images"])


def _only_photos(paths: list[Path], where: str) -> list[Path]:
    foreign = [path for path in paths if path.suffix.lower() in FOREIGN]
    if foreign:
        raise _CellError(
            f"{where} holds {shown(foreign[0].name)}", "JPEG, PNG or WebP photos", "convert it, or move it elsewhere"
        )
    photos = [_photo(path) for path in paths if path.suffix.lower() in SUFFIXES]
    if not photos:
        raise _CellError(
            f"{where} holds no photo", f"files ending in {', '.join(SUFFIXES)}", "put 3-5 photos of the subject there"
        )
    return photos


def _photo(path: Path) -> Path:
    if not path.is_file():
        raise _CellError(f"{shown(str(path))} is not a regular file", "photo files", "copy the photo itself there")
    if path.suffix.lower() not in SUFFIXES:
        raise _CellError(
            f"got {shown(path.name)}",
            f"files ending in {', '.join(SUFFIXES)}",
            "convert the photo, or correct its name",
        )
    return path


WANTED = {
    "subject": ("letters, digits, _ and -, at most 64, the first a letter or digit", "correct the id"),
    "class": (f"a class noun of at most {MAX_NAME} characters, such as dog", "name the kind of thing the subject is"),
    "images": ("a folder, a glob or a list of files", "give paths relative to the manifest's folder"),
}
COLUMNS: dict[str, Callable[[Any, Path], Any]] = {
    "subject": _id,
    "class": _phrase,
    "images": _images,
    "caption": _caption,
    "identifier": _word,
    "seed": _whole(0, 2**63),
    "steps": _whole(1, 10**9),
    "lr": _rate,
    "rank": _whole(1, 1025),
    "prior_weight": _factor,
}
