"""The files of a subject's folder, read without trust: missing, damaged or foreign files become notes, never failures.

Only JSON and YAML 1.2 are parsed, and a path that stands in a file is used only if it stays in the folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from dbtrain.evaluate import RESULT as EVALUATION
from dbtrain.results.record import RECORD
from dbtrain.settings import yaml12

CONFIG, LOG = "config.yaml", "log.jsonl"
SAMPLES = "samples"
FINAL = "samples"
"""Name of the last sheet in `samples/`. Sheets drawn while training are called like `step-000100`."""
IMAGE = re.compile(r"prompt-(\d{2,4})-image-(\d{2,4})\.png")
STEP = re.compile(r"step-(\d{6,9})")
MAX_BYTES = 4 * 2**20
"""Largest size of a text file that is read. Of a longer log the end is read."""
RUN_BYTES = 128 * 2**20
"""The same for the run's own evaluation.json, which has about 650 bytes for each subject."""
SANE = 1e15
"""Larger numbers are no measurements, and charts could not draw them."""
YEARS = range(1990, 2200)
"""Years in which a run can have ended."""

Stamp = tuple[str, int, int]
"""A file's path in its folder, its size in bytes and its time of change in ns. An unchanged file keeps its stamp."""


def stamps(folder: Path) -> list[Stamp]:
    """The files of a subject's folder that a page is made from, sorted; empty if there is no folder."""
    images = [
        f"{SAMPLES}/{sheet}/{name}"
        for sheet in _names(folder / SAMPLES)
        if sheet == FINAL or STEP.fullmatch(sheet)
        for name in _names(folder / SAMPLES / sheet)
        if IMAGE.fullmatch(name)
    ]
    return sorted(filter(None, (_stamp(folder, name) for name in (RECORD, CONFIG, LOG, EVALUATION, *images))))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _stamp(folder: Path, name: str) -> Stamp | None:
    try:
        status = os.lstat(folder / name)
    except OSError:
        return None
    return (name, status.st_size, status.st_mtime_ns)


def read_text(path: Path, notes: list[str], most: int = MAX_BYTES, tail: bool = False) -> str:
    """A file's text; empty if there is none, or, with a note, if the file is a link, a pipe or cannot be read.

    Of a file longer than `most` bytes nothing is read; with `tail` its end is read.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                notes.append(f"{path.name} is not read: it is no plain file")
                return ""
            if status.st_size > most and not tail:
                notes.append(f"{path.name} is not read: it is larger than {most / 2**20:g} MiB")
                return ""
            file.seek(max(0, status.st_size - most))
            content = file.read(most)
    except FileNotFoundError:
        return ""
    except OSError as error:
        what = "it is a link" if error.errno == errno.ELOOP else error.strerror
        notes.append(f"{path.name} cannot be read: {what}")
        return ""
    return content.decode("utf-8", "replace")


def read_object(path: Path, notes: list[str], most: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file, or, with a note, if it holds no JSON object."""
    text = read_text(path, notes, most)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is damaged: it holds no JSON object")
        return {}
    return value


def read_log(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of a folder's log that are JSON objects with a step, in order; a line half written is left out."""
    lines = []
    for line in read_text(folder / LOG, notes, tail=True).splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and number(value.get("step")) is not None:
            lines.append(value)
    return lines


@lru_cache(maxsize=64)
def settings(text: str) -> dict[str, str | list[str]]:
    """A config.yaml's text as dotted keys, with each value's own text or a list of texts; empty if it is no YAML."""
    try:
        root = yaml12.read_node(text)
    except yaml.YAMLError:
        return {}
    return dict(_flat(root, "")) if isinstance(root, yaml.MappingNode) else {}


def _flat(node: yaml.MappingNode, prefix: str) -> Iterable[tuple[str, str | list[str]]]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, yaml.SequenceNode):
            yield name, [str(item.value) for item in value.value]
        else:
            yield name, value.value


def number(value: Any) -> float | None:
    """A number between -SANE and SANE, or None for anything else: JSON has no NaN, and a text is no measurement."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -SANE < value < SANE:
        return None
    return 0.0 if abs(value) < 1 / SANE else float(value)


def moment(iso: Any) -> float | None:
    """Seconds since 1970 of an ISO time, UTC if it names no zone. None for other values and years outside of YEARS."""
    try:
        time = datetime.fromisoformat(iso)
    except (TypeError, ValueError):
        return None
    if time.year not in YEARS:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def text(value: Any, limit: int = 2000) -> str:
    """A value as text of bounded length; empty for None."""
    shown = "" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def numbers(value: Any) -> dict[str, float]:
    """The numbers of a mapping by name; empty for other values."""
    items = value.items() if isinstance(value, Mapping) else ()
    return {text(key, 80): size for key, item in items if (size := number(item)) is not None}


def inside(folder: Path, name: Any) -> Path | None:
    """The file of that name below a folder; None if there is none, or if the name leads out of the folder."""
    if not isinstance(name, str) or "\0" in name or not name:
        return None
    path = folder / name
    try:
        return path if path.is_file() and path.resolve().is_relative_to(folder.resolve()) else None
    except (OSError, RuntimeError):
        return None
