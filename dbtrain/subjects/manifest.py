"""The manifest: which subjects there are, what class each is of, and where its photos lie.

Columns: `subject`, `class`, `images` (a folder, a glob, or a list; relative to the manifest's folder), and optionally
`mask` (the same), `caption`, `identifier`, `seed`, `steps`, `lr`, `rank`, `prior_weight`. An empty cell means that the
run's configuration holds. In CSV a list is separated by semicolons. One reading finds all defects; nothing is ever
written.
"""

import difflib
import re
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError, shown
from dbtrain.subjects.columns import COLUMNS, check_class
from dbtrain.subjects.finding import CellError, Finding, refuse
from dbtrain.subjects.photos import photos_of
from dbtrain.subjects.rows import ManifestRow, read_rows
from dbtrain.values import Subject


def read_manifest(path: Path, photos: bool = True) -> list[Subject]:
    """The subjects of a manifest, in its order. Raises one DataError with all defects, a line each."""
    subjects, findings = scan_manifest(path, photos)
    refuse(findings)
    return subjects


def scan_manifest(path: Path, photos: bool = True) -> tuple[list[Subject], list[Finding]]:
    """(subjects of rows without a defect, all defects) of a manifest. It is read here and nowhere else in a command.

    photos: False leaves the column `images` out, for subjects whose photos are in shards already.
    Raises DataError only if the file as a whole cannot be read.
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
            subjects.append(Subject(**{COLUMNS[name].field: value for name, value in cells.items()}))
    if not rows:
        required = ", ".join(name for name, column in COLUMNS.items() if column.required)
        findings.append(Finding("", f"{path}", "has no rows", f"write one row a subject with {required}"))
    return subjects, findings


def subject_from_folder(folder: Path, class_noun: str) -> Subject:
    """The subject of the photos in one folder. Its id is the folder's name, with dashes for what an id cannot hold."""
    folder = Path(folder)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-_")[:64] or "subject"
    try:
        return Subject(name, check_class(class_noun, folder), photos_of(str(folder.resolve()), folder))
    except CellError as bad:
        what, want, remedy = bad.args
        raise DataError(f"{folder}: {what}, want {want}; {remedy}") from bad


def _check_row(row: ManifestRow, folder: Path, photos: bool) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(values of the sound cells, defects as (what, remedy)) of one row."""
    defects = [(what, remedy) for what, remedy in (problem.split("; ", 1) for problem in row.problems)]
    if row.problems and not row.cells:
        return {}, defects
    defects += [(f"column {shown(name)}: is unknown", _hint(name)) for name in row.cells if name not in COLUMNS]
    values = {}
    for name, column in COLUMNS.items():
        if name in ("images", "mask") and not photos:
            values[name] = ()
            continue
        cell = row.cells.get(name)
        try:
            if cell is not None and cell != []:
                values[name] = column.check(cell, folder)
            elif column.required:
                raise CellError("got nothing", *column.required)
        except CellError as bad:
            what, want, remedy = bad.args
            defects.append((f"column {name}: {what}, want {want}", remedy))
    if "caption" in values and not _names_subject(values):
        what = "column caption: does not name the subject, want {identifier} in it"
        defects.append((what, "write {identifier} where the subject's rare name shall stand"))
    return values, defects


def _names_subject(values: dict[str, Any]) -> bool:
    identifier = values.get("identifier")
    return "{identifier}" in values["caption"] or (identifier is not None and identifier in values["caption"])


def _clashes(ids: list[tuple[int, str]]) -> dict[int, list[tuple[str, str]]]:
    """Defects of ids that several rows have, by place of the row.

    Of equal ids, the first row is sound. Ids that differ only by case are different subjects on some disks and the same
    on others, so all their rows have a defect.
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
