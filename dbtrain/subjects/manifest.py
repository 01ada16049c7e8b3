"""The manifest: which subjects there are, what class each is of, and where its photos lie.

Columns: `subject`, `class`, `images` (a folder, a glob, or a list; relative to the manifest's folder), and optionally
`mask` (the same), `caption`, `captions`, `identifier`, `seed`, `steps`, `lr`, `rank`, `prior_weight`. An empty cell
means that the run's configuration holds. In CSV a list is separated by semicolons. Capitals in names of columns do not
matter, and columns of other names are one's own. One reading finds all defects; nothing is ever written.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError, shown
from dbtrain.storage.atomic import file_digest
from dbtrain.subjects.captions import listed_captions, with_subject
from dbtrain.subjects.columns import COLUMNS, check_class
from dbtrain.subjects.finding import CellError, Finding, defects, refuse
from dbtrain.subjects.photos import Found, find_photos
from dbtrain.subjects.prompts import names_subject
from dbtrain.subjects.rows import READERS, ManifestRow, read_rows
from dbtrain.values import Subject

NAMED = 12
"""Most columns that a note names."""
ALIASES = {"subject": ("id", "name"), "class": ("category", "label"), "images": ("photos", "path", "folder", "files")}
"""Other names that people give to required columns."""


def read_manifest(path: Path, photos: bool = True) -> list[Subject]:
    """The subjects of a manifest, in its order. Raises one DataError with all defects, a line each."""
    subjects, findings = scan_manifest(path, photos)
    refuse(findings)
    return subjects


def scan_manifest(path: Path, photos: bool = True) -> tuple[list[Subject], list[Finding]]:
    """(subjects of rows without a defect, all defects) of a manifest. It is read here and nowhere else in a command.

    path: a file, or a folder of such files, which count as one manifest in the order of their names. photos: False
    leaves the column `images` out, for subjects whose photos are in shards already.
    Raises DataError only if a file as a whole cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return join_scans((file, scan_file(file, photos)) for file in manifest_files(path))
    rows, findings = _with_our_columns(read_rows(path), path, photos)
    if defects(findings):
        return [], findings
    subjects: list[Subject] = []
    checked = [(row, *_check_row(row, path.resolve().parent, photos)) for row in rows]
    clashes = _clashes([(row.place, cells["subject"]) for row, cells, _, _ in checked if "subject" in cells])
    for row, cells, wrong, said in checked:
        name, place = cells.get("subject", ""), f"{path}:{row.place}"
        wrong += clashes.get(row.place, [])
        findings += [Finding(name, place, what, remedy) for what, remedy in wrong]
        if not wrong:
            findings += [Finding(name, place, what, remedy, note=True) for what, remedy in said]
            subjects.append(Subject(**{COLUMNS[name].field: value for name, value in cells.items()}))
    return subjects, findings


def manifest_files(folder: Path) -> list[Path]:
    """The manifests in a folder, by name; hidden files are none."""
    shown_files = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return [path for path in shown_files if path.suffix.lower() in READERS]


def manifest_digest(path: Path) -> str:
    """SHA-256 (hex) of a manifest's content, of a folder's files with their names."""
    if not path.is_dir():
        return file_digest(path)
    digests = [[file.name, file_digest(file)] for file in manifest_files(path)]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def scan_file(file: Path, photos: bool = True) -> tuple[list[Subject], list[Finding]]:
    """What `scan_manifest` says of one of several files. One that cannot be read is a finding, and the others count."""
    try:
        return scan_manifest(file, photos)
    except DataError as error:
        return [], [Finding("", str(file), str(error).removeprefix(f"{file}: "), "mend it, or take it out")]


def join_scans(
    scans: Iterable[tuple[Path, tuple[list[Subject], list[Finding]]]], taken: dict[str, str] | None = None
) -> tuple[list[Subject], list[Finding]]:
    """What several files say together. The first that has an id keeps it.

    taken: the file of each id that is known, in small letters; those of these files are added.
    """
    subjects: list[Subject] = []
    findings: list[Finding] = []
    taken = {} if taken is None else taken
    for file, (rows, found) in scans:
        findings += found
        for row in rows:
            if (first := taken.setdefault(row.id.casefold(), str(file))) != str(file):
                findings.append(Finding(row.id, str(file), f"its id is in {first} too", "give it another id"))
            else:
                subjects.append(row)
    return subjects, findings


def _with_our_columns(
    rows: list[ManifestRow], path: Path, photos: bool
) -> tuple[list[ManifestRow], list[Finding]]:
    """(the rows with the names of `COLUMNS`, what is to say about the names of the manifest as a whole, once).

    A name that all rows have and that is nearly one of ours is a defect of the manifest, and one that only some have is
    a defect of these rows.
    """
    if not rows:
        required = ", ".join(name for name, column in COLUMNS.items() if column.required)
        return [], [Finding("", f"{path}", "has no rows", f"write one row a subject with {required}")]
    full = [row for row in rows if row.cells]
    names = dict.fromkeys(name for row in full for name in row.cells)
    ours = {name: name.strip().casefold() for name in names if name.strip().casefold() in COLUMNS}
    found, own = [], []
    for name in names:
        everywhere = all(name in row.cells for row in full)
        if name not in ours and (not name or _near(name)):
            if everywhere:
                found.append(Finding("", f"{path}", f"column {shown(name)}: is unknown", _hint(name)))
        elif name not in ours:
            own.append(name)
    counted = [*ours.values()]
    for name in dict.fromkeys(one for one in counted if counted.count(one) > 1):
        found.append(Finding("", f"{path}", f"has the column {name} twice, with other capitals", "keep one of them"))
    if full and not found:
        wanted = [name for name, column in COLUMNS.items() if column.required and (photos or name != "images")]
        absent = [name for name in wanted if name not in ours.values()]
        found = [Finding("", f"{path}", f"has no column {name}", _rename(name, own)) for name in absent]
    if own:
        shown_names = ", ".join(shown(name) for name in own[:NAMED])
        found.append(Finding("", f"{path}", f"columns that are not read: {shown_names}", _hint(""), note=True))
    return [_with_names(row, ours, own) for row in rows], found


def _with_names(row: ManifestRow, ours: dict[str, str], own: list[str]) -> ManifestRow:
    """The row with our names of columns, and without those of one's own."""
    cells = {ours.get(name, name): cell for name, cell in row.cells.items() if name not in own}
    return ManifestRow(row.place, cells, row.problems)


def _rename(name: str, own: list[str]) -> str:
    """What to do about a required column that is not there."""
    alike = [one for one in own if name in one.casefold() or one.casefold() in ALIASES.get(name, ())]
    return f"call the column {shown(alike[0])} {name}" if alike else f"the columns are {', '.join(COLUMNS)}"


def subject_from_folder(
    folder: Path, class_noun: str, say: Callable[[str], object] = lambda line: None
) -> Subject:
    """The subject of the photos in one folder. Its id is the folder's name, with dashes for what an id cannot hold.

    say: gets a line for the files of the folder that are not used, for each reason.
    """
    folder = Path(folder)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-_")[:64] or "subject"
    try:
        found = find_photos(str(folder.resolve()), folder)
        for what, remedy in found.notes():
            say(f"note: {folder}: {what}; {remedy}")
        if found.captions:
            say(f"note: {folder}: captions beside photos are not used here; those of class images are the class's")
        return Subject(name, check_class(class_noun, folder), tuple(found.photos))
    except CellError as bad:
        what, want, remedy = bad.args
        raise DataError(f"{folder}: {what}, want {want}; {remedy}") from bad


Lines = list[tuple[str, str]]
"""(what, remedy) of each defect or note of a row."""


def _check_row(row: ManifestRow, folder: Path, photos: bool) -> tuple[dict[str, Any], Lines, Lines]:
    """(values of the sound cells, defects, notes) of one row."""
    wrong = [(what, remedy) for what, remedy in (problem.split("; ", 1) for problem in row.problems)]
    if row.problems and not row.cells:
        return {}, wrong, []
    wrong += [(f"column {shown(name)}: is unknown", _hint(name)) for name in row.cells if name not in COLUMNS]
    values: dict[str, Any] = {}
    found = Found()
    for name, column in COLUMNS.items():
        cell = row.cells.get(name)
        with _told(name, wrong):
            if name in ("images", "mask") and not photos:
                values[name] = ()
            elif name == "images" and cell is not None and cell != []:
                found = find_photos(cell, folder)
                values[name] = tuple(found.photos)
            elif cell is not None and cell != []:
                values[name] = column.check(cell, folder)
            elif column.required:
                raise CellError("got nothing", *column.required)
    if "caption" in values and not names_subject(values["caption"], values.get("identifier")):
        what = "column caption: does not name the subject, want {identifier} in it"
        wrong.append((what, "write {identifier} where the subject's rare name shall stand"))
    said = [*found.notes()]
    with _told("captions", wrong):
        said += _give_captions(values, found, row.cells.get("images"), folder)
    return values, wrong, said


@contextmanager
def _told(name: str, wrong: Lines) -> Iterator[None]:
    """Add a CellError of the block to the defects, under the column's name."""
    try:
        yield
    except CellError as bad:
        what, want, remedy = bad.args
        wrong.append((f"column {name}: {what}, want {want}", remedy))


def _give_captions(values: dict[str, Any], found: Found, cell: Any, folder: Path) -> Lines:
    """Put the photos' own captions into the values, those of the column `captions` first; what is to say about them."""
    listed, photos = values.pop("captions", None), values.get("images", ())
    captions = dict(found.captions)
    if listed and photos:
        captions |= listed_captions(listed, cell, photos, folder)
    if not captions:
        return []
    identifier = values.get("identifier")
    values["captions"] = with_subject(captions, photos, identifier)
    origins = ", ".join(sorted({origin.rpartition(".")[2] for _, origin in captions.values()}))
    what = f"captions of {len(captions)} of {len(photos)} photos from: {origins}"
    said = [(what, "move them away if they are not meant")]
    without = [text for text, _ in captions.values() if not names_subject(text, identifier)]
    if without:
        what = f"{len(without)} of them do not name the subject, such as {shown(without[0])}"
        remedy = "{subject} is put in front; write it where it belongs, or give the column identifier the name they use"
        said.append((what, remedy))
    return said


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


def _near(name: str) -> str | None:
    """The column that a name was probably meant as; None for one's own."""
    return next(iter(difflib.get_close_matches(name.casefold(), COLUMNS, n=1, cutoff=0.75)), None)


def _hint(name: str) -> str:
    near = _near(name)
    return f"did you mean {near}?" if near else f"the columns are {', '.join(COLUMNS)}"
