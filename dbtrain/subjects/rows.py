"""Manifest files as plain rows: CSV, JSONL, YAML and Parquet become the same values before anything is judged.

A cell is None (not given), a string, a number or a list; a row knows its place in the file.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dbtrain.errors import DataError, shown

PLAIN = ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in PLAIN}


@dataclass(frozen=True)
class ManifestRow:
    """One manifest row: its place (a line; in Parquet a row number; from 1), its cells, defects of its syntax."""

    place: int
    cells: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_rows(path: Path) -> list[ManifestRow]:
    """All rows of a manifest, its format told by the file's ending; DataError if the file as a whole cannot be read."""
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
    """Cells with stripped names and strings, and every way of saying "not given" turned into None."""
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
    reader = csv.reader(io.StringIO(_text(content), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        places, lines = [], []
        place = reader.line_num + 1
        for values in reader:
            if any(value.strip() for value in values):
                places.append(place)
                lines.append(values)
            place = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} is no CSV ({error}); check its quotes") from error
    used = _used_columns(header, lines)
    repeated = sorted({header[i] for i in used if [header[j] for j in used].count(header[i]) > 1})
    if repeated:
        raise DataError(f"column {shown(repeated[0])} stands twice in the header; keep one of them")
    for place, values in zip(places, lines):
        over = any(value.strip() for value in values[len(header) :])
        extra = (f"has {len(values)} cells for {len(header)} columns; put quotes around cells with commas",)
        yield ManifestRow(place, {header[i]: values[i] for i in used if i < len(values)}, extra if over else ())


def _used_columns(header: list[str], lines: list[list[str]]) -> list[int]:
    """The columns that have a name, or a cell that is not empty: spreadsheets write others behind those in use."""
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
    """Rows of a YAML list of mappings. Nothing is constructed: scalars stay text, so that `no` is a name, not False."""
    try:
        text = _text(content)
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise DataError(f"line {event.start_mark.line + 1} uses an alias (*name); write the value out")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise DataError(f"is no YAML ({' '.join(str(error).split())}); write a list of subjects") from error
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
