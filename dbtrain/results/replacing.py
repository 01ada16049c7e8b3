"""A new result beside the old one, which it replaces when it is whole.

A subject that has a result and is trained again publishes into `next/` of its folder. Once the record is there, all
files move to their places, the record last. A process that was killed in between leaves `next/record.json`, and whoever
opens the subject next moves the rest.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError
from dbtrain.results.record import RECORD, read_record
from dbtrain.storage.atomic import hidden, sync_folder, sync_tree

NEXT = "next"
WHOLE = ("samples/samples", "samples/samples-small")
"""Folders that hold nothing of an old result once they are replaced."""


def take_place(folder: Path) -> None:
    """Let a whole result in `next/` take the place of the one before, and remove one that is not whole."""
    staged = folder / NEXT
    if not staged.is_dir():
        return
    if (staged / RECORD).exists():
        _move(staged, folder)
    gone = hidden(staged)
    os.rename(staged, gone)
    shutil.rmtree(gone)
    sync_folder(folder)


def _move(staged: Path, folder: Path) -> None:
    new, old = read_record(staged) or {}, _old_record(folder)
    sync_tree(staged)
    for name in WHOLE:
        kept = {path.name for path in (staged / name).glob("*")}
        # What has moved already, before a kill, is of the new result too: the record names it.
        kept |= set(new.get("samples", {}))
        for path in (folder / name).glob("*"):
            if path.name not in kept:
                path.unlink()
    for name in old.get("files", {}):
        if name not in new["files"]:
            (folder / name).unlink(missing_ok=True)
    paths = sorted(path for path in staged.rglob("*") if path.is_file() and path != staged / RECORD)
    for path in [*paths, staged / RECORD]:
        place = folder / path.relative_to(staged)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.name == RECORD:
            for parent in {folder / each.relative_to(staged).parent for each in paths}:
                sync_folder(parent)
        os.replace(path, place)
    sync_folder(folder)


def _old_record(folder: Path) -> dict[str, Any]:
    """The record that is replaced; empty where it is gone or damaged."""
    try:
        return read_record(folder) or {}
    except DataError:
        return {}
