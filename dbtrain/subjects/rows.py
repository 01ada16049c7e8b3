"""Rows of a manifest file: CSV, JSONL, YAML and Parquet become the same values before any cell is checked.

A cell is a string, a number or a list; None is an empty cell.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dbtrain.errors import DataError, shown
from dbtrain.settings import yaml12

SEPARATORS = ",;\t|"
"""What may separate the cells of a CSV file. Spreadsheets write semicolons where the comma is a decimal sign."""
SEPARATOR_LINE = re.compile(r"sep=([,;\t|])\r?\n", re.IGNORECASE)
PLAIN_TAGS = {f"{yaml12.CORE}{name}" for name in (*yaml12.SCALARS, "seq", "map")}
"""Tags of text, numbers, lists and mappings in YAML. Any other would construct an object."""


@dataclass(frozen=True)
class ManifestRow:
    """One row of a manifest. place: its line from 1, in Parquet its number from 1. problems: defects of its syntax."""

    place: int
    cells: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_rows(path: Path) -> list[ManifestRow]:
    """All rows of a manifest, in the format of the file's ending. DataError if the file as a whole cannot be read."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: is no manifest by its ending {path.suffix!r}; use one of {', '.join(READERS)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    try:
        return [ManifestRow(row.place, _tidy(row.cells), row.problems) for row in reader(content)]
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{path}: is nested too deeply; a manifest is a flat list of subjects") from error


def _tidy(cells: dict[Any, Any]) -> dict[str, Any]:
    """The cells with stripped names and strings; None for every form of an empty cell."""
    return {str(name).strip(): _tidy_cell(value) for name, value in cells.items()}


def _tidy_cell(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, list):
        return [_tidy_cell(part) for part in value]
    return value


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"line {line} is not UTF-8 (byte {content[error.start]:#04x})"
        raise DataError(f"{what}; save the manifest as UTF-8") from error


def _from_csv(content: bytes) -> Iterator[ManifestRow]:
    text = _text(content)
    stream = io.StringIO(text, newline="")
    if SEPARATOR_LINE.match(text):  # Excel's own line, which says what separates the cells
        stream.readline()
    reader = csv.reader(stream, strict=True, delimiter=_separator(text))
    skipped = 1 if SEPARATOR_LINE.match(text) else 0
    try:
        header = [name.strip() for name in next(reader, [])]
        places, lines = [], []
        place = skipped + reader.line_num + 1
        for values in reader:
            if any(value.strip() for value in values):
                places.append(place)
                lines.append(values)
            place = skipped + reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"line {skipped + reader.line_num} is no CSV ({error}); check its quotes") from error
    used = _used_columns(header, lines)
    repeated = sorted({header[i] for i in used if [header[j] for j in used].count(header[i]) > 1})
    if repeated:
        raise DataError(f"column {shown(repeated[0])} stands twice in the header; keep one of them")
    for place, values in zip(places, lines):
        over = any(value.strip() for value in values[len(header) :])
        extra = (f"has {len(values)} cells for {len(header)} columns; put quotes around cells with commas",)
        cells = {header[i]: values[i] if i < len(values) else "" for i in used}
        yield ManifestRow(place, cells, extra if over else ())


def _separator(text: str) -> str:
    """What separates the cells of a CSV file: a comma, unless its header shows more cells with something else."""
    if said := SEPARATOR_LINE.match(text):
        return said[1]
    header = next((line for line in text.splitlines() if line.strip()), "")
    return "," if "," in header else max(SEPARATORS, key=header.count)


def _used_columns(header: list[str], lines: list[list[str]]) -> list[int]:
    """Numbers of the columns that have a name or a cell with content. Spreadsheets add others, without either."""
    return [i for i, name in enumerate(header) if name or any(i < len(line) and line[i].strip() for line in lines)]


def _from_jsonl(content: bytes) -> Iterator[ManifestRow]:
    for place, line in enumerate(_text(content).split("\n"), 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line, object_pairs_hook=_unique)
        except ValueError as error:
            yield ManifestRow(place, {}, (f"is no JSON ({error}); write one object a line",))
            continue
        if isinstance(cells, dict):
            yield ManifestRow(place, cells)
        else:
            yield ManifestRow(place, {}, (f"is {shown(cells)}; write one object a line",))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    cells = dict(pairs)
    if len(cells) < len(pairs):
        raise ValueError("a name stands twice")
    return cells


def _from_yaml(content: bytes) -> Iterator[ManifestRow]:
    """Rows of a YAML list of mappings. Scalars stay text, so that `no` is a name and not False."""
    try:
        root = yaml12.read_node(_text(content))
    except yaml.YAMLError as error:
        line, problem = yaml12.explain_error(error)
        raise DataError(f"line {line} is no YAML ({problem}); write a list of subjects") from error
    if root is None:
        return
    if not isinstance(root, yaml.SequenceNode):
        raise DataError("is no list at its top level; begin each subject with `- subject: ...`")
    for node in root.value:
        yield _yaml_row(node)


def _yaml_row(node: yaml.Node) -> ManifestRow:
    place = node.start_mark.line + 1
    try:
        cells = _plain(node)
    except DataError as error:
        return ManifestRow(place, {}, (str(error),))
    if not isinstance(cells, dict):
        return ManifestRow(place, {}, (f"is {shown(cells)}; write `- subject: ...` with its columns below",))
    return ManifestRow(place, cells)


def _plain(node: yaml.Node) -> Any:
    if node.tag not in PLAIN_TAGS:
        raise DataError(f"has the tag {shown(node.tag)}; write plain values")
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child) for child in node.value]
    pairs = [(str(_plain(key)), _plain(value)) for key, value in node.value]
    if len(dict(pairs)) < len(pairs):
        raise DataError("has a column twice; keep one of them")
    return dict(pairs)


def _from_parquet(content: bytes) -> Iterator[ManifestRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"is no readable Parquet file ({shown(str(error))}); write it again") from error
    for place, cells in enumerate(table, 1):
        yield ManifestRow(place, cells)


READERS: dict[str, Callable[[bytes], Iterator[ManifestRow]]] = {
    ".csv": _from_csv,
    ".jsonl": _from_jsonl,
    ".yaml": _from_yaml,
    ".yml": _from_yaml,
    ".parquet": _from_parquet,
}
