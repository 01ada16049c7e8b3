"""Captions of single photos: texts beside them, an imagefolder's metadata, and what a caption may hold."""

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError, shown
from dbtrain.subjects.finding import CellError
from dbtrain.subjects.prompts import names_subject, unknown_place
from dbtrain.subjects.rows import read_rows

MAX_CAPTION = 4000
"""Longest caption, in characters: about the 1024 tokens that Ideogram 4 reads."""
MAX_BYTES = 65_536
"""Largest text file beside a photo."""
SIDECARS = (".txt", ".caption")
"""Endings of a text file that has the name of a photo and holds its caption."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""An imagefolder's table of captions, as the library `datasets` reads it."""
FILE_COLUMNS = ("file_name", "image")
TEXT_COLUMNS = ("text", "caption", "prompt")
"""Columns of such a table, the first that is there."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
LONE = re.compile(r"[\ud800-\udfff]")
"""Half of a pair that stands for one character. JSON can spell it alone, but it is no text, and no encoder takes it."""
Caption = tuple[str, str]
"""A caption, and the name of the file that it comes from."""


def check_caption(text: str) -> str:
    """The text, which is sound as a caption template."""
    if len(text) > MAX_CAPTION:
        remedy = "shorten it; CLIP reads 77 tokens, T5 256 or 512"
        raise CellError(f"got {len(text)} characters", f"at most {MAX_CAPTION}", remedy)
    if CONTROL.search(text):
        raise CellError(f"got a control character in {shown(text)}", "one line of plain text", "take it out")
    if LONE.search(text):
        raise CellError(f"got {shown(text)}, with half a character", "Unicode text", "write that character again")
    if text.count("{") != text.count("}"):
        raise CellError(f"got {shown(text)}", "paired braces", "take single braces out")
    if odd := unknown_place(text):
        want = "{identifier}, {class}, {subject} or [trigger]"
        raise CellError(f"got the placeholder {shown(odd)}", want, "correct its name; only JSON may have other braces")
    return text


def check_captions(cell: Any) -> tuple[str, ...] | dict[str, str]:
    """The captions of a cell: a list in the order of the photos, or a mapping of file names. Empty text is none."""
    if not isinstance(cell, (list, tuple, dict)):
        what, want = f"got {shown(cell)}", "a list, or a mapping of file names to captions (JSONL, YAML)"
        raise CellError(what, want, "in CSV, put the caption of 1.jpg into 1.txt beside it")
    values = cell.values() if isinstance(cell, dict) else cell
    texts = ["" if value is None else value for value in values]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise CellError(f"got {shown(wrong[0])}", "text", "put quotes around it")
    checked = [check_caption(text.strip()) for text in texts]
    return dict(zip(map(str, cell), checked)) if isinstance(cell, dict) else tuple(checked)


def listed_captions(
    listed: tuple[str, ...] | Mapping[str, str], cell: Any, photos: Sequence[Path], folder: Path
) -> dict[Path, Caption]:
    """The captions of a manifest's column, by photo. cell: that of `images`."""
    if not isinstance(listed, Mapping):
        paths = [folder / part for part in (cell if isinstance(cell, list) else [cell])]
        if set(paths) != set(photos):
            what = f"is a list of {len(listed)}, but images is no list of files"
            raise CellError(what, "the files in images, one by one", "or give a mapping of file names to captions")
        if len(paths) != len(listed):
            what = f"has {len(listed)} captions for {len(paths)} photos"
            raise CellError(what, "one for each", 'write "" for a photo without one')
        return {path: (text, "the manifest") for path, text in zip(paths, listed) if text}
    known = {photo.name: photo for photo in photos} | {str(photo.relative_to(folder)): photo for photo in photos
                                                       if photo.is_relative_to(folder)}  # fmt: skip
    strange = [name for name in listed if name not in known]
    if strange:
        raise CellError(f"names {shown(strange[0])}", "names of the subject's photos", "correct the name")
    return {known[name]: (text, "the manifest") for name, text in listed.items() if text}


def captions_beside(
    photos: Iterable[Path], names: Mapping[Path, Sequence[str]]
) -> tuple[dict[Path, Caption], dict[str, list[str]]]:
    """(captions that lie beside photos, by photo; files that a table names and that are not beside it, by its name).

    A text file comes before a table. names: the names in each folder that holds a photo.
    """
    tables = {folder: _table(folder, there) for folder, there in names.items()}
    found: dict[Path, Caption] = {}
    for photo in photos:
        side = next((photo.stem + end for end in SIDECARS if photo.stem + end in names[photo.parent]), None)
        text = _read_text(photo.with_name(side)) if side else ""
        if text and side:
            found[photo] = (text, side)
        elif photo.name in tables[photo.parent]:
            found[photo] = tables[photo.parent][photo.name]
    absent: dict[str, list[str]] = {}
    for folder, table in tables.items():
        for file, (_, name) in table.items():
            if file not in names[folder]:
                absent.setdefault(name, []).append(file)
    return found, absent


def with_subject(captions: Mapping[Path, Caption], photos: Sequence[Path], identifier: str | None) -> tuple[str, ...]:
    """A template for each photo, empty where it has none. One that does not name the subject gets it in front."""
    texts = [captions.get(photo, ("", ""))[0] for photo in photos]
    return tuple(text if not text or names_subject(text, identifier) else f"{{subject}}, {text}" for text in texts)


def _read_text(path: Path) -> str:
    """A text file's content on one line; CellError if it is none, or sound text but no caption."""
    try:
        # Non-blocking, so that a pipe under this name is refused instead of waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CellError(f"{shown(path.name)} is not a regular file", "a text file", "copy the text itself")
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise CellError(f"{shown(path.name)} is larger than {MAX_BYTES} bytes", "a caption", "move it elsewhere")
        text = content.decode("utf-8-sig")
    except OSError as error:
        remedy = "check its permissions"
        raise CellError(f"{shown(path.name)} cannot be read ({error.strerror})", "a caption", remedy) from error
    except UnicodeDecodeError as error:
        raise CellError(f"{shown(path.name)} is not UTF-8", "a caption", "save it as UTF-8") from error
    return _named(path.name, " ".join(text.split()))


def _named(name: str, text: str) -> str:
    """The text, sound as a caption; the CellError names the file and does not repeat what is in it."""
    try:
        return check_caption(text)
    except CellError as bad:
        what, want, remedy = bad.args
        what = what if what.startswith("got the placeholder") or text not in what else "got what is no caption"
        raise CellError(f"{shown(name)}: {what}", want, remedy) from bad


def _table(folder: Path, there: Sequence[str]) -> dict[str, Caption]:
    """The captions in a folder's metadata file, by name of the photo; empty where there is none."""
    name = next((name for name in METADATA if name in there), None)
    if name is None:
        return {}
    if not (folder / name).is_file():
        raise CellError(f"{shown(name)} is not a regular file", "a table of captions", "copy the table itself")
    try:
        rows = read_rows(folder / name)
    except DataError as error:
        what, _, remedy = str(error).removeprefix(f"{folder / name}: ").rpartition("; ")
        raise CellError(f"{shown(name)} {what}", "a table of captions", remedy) from error
    problem = next((f"line {row.place} {row.problems[0]}" for row in rows if row.problems), None)
    if problem:
        what, _, remedy = problem.rpartition("; ")
        raise CellError(f"{shown(name)}: {what}", "a table of captions", remedy)
    found = {}
    for row in rows:
        file = next((row.cells[column] for column in FILE_COLUMNS if row.cells.get(column)), None)
        text = next((row.cells[column] for column in TEXT_COLUMNS if row.cells.get(column)), None)
        if isinstance(file, str) and isinstance(text, str):
            found[file.removeprefix("./")] = (_named(name, " ".join(text.split())), name)
    if rows and not found:
        want = f"columns {FILE_COLUMNS[0]} and {TEXT_COLUMNS[0]}"
        raise CellError(f"{shown(name)} holds no caption of a photo", want, "correct it, or move it elsewhere")
    return found
