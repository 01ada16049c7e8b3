"""The pictures of a subject's page: its photos, its samples by step at fixed seeds, the base model's beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dbtrain.data.index import Entry, Index
from dbtrain.data.stream import read_samples
from dbtrain.errors import DataError
from dbtrain.report.facts import Facts
from dbtrain.report.pictures import Thumbnails
from dbtrain.report.reading import FINAL, IMAGE, SAMPLES, STEP, Stamp, inside, number, text

PHOTOS, STEPS, PROMPTS, SEEDS = 12, 8, 8, 2
"""Most photos, sheets drawn while training, prompts and seeds on a page. The page says how many it leaves out."""
EVALUATED = 30
"""Most prompts of the evaluation on a page."""

Picture = dict[str, Any]
NO_PICTURES: dict[str, Any] = {"photos": [], "strips": {"columns": [], "prompts": []}, "evaluated": []}
"""The pictures of a page, without any."""


def load_index(shards: Path, notes: list[str]) -> Index | None:
    """The index of the run's photos. None if there are no shards, or, with a note, if the index is damaged."""
    if not shards.is_dir():
        return None
    try:
        return Index.load(shards)
    except DataError as error:
        notes.append(f"photos are not shown: {error}")
        return None


def photos(shards: Path, rows: Sequence[Entry], thumbnails: Thumbnails, notes: list[str]) -> list[Picture]:
    """The subject's photos as stored for training; each is compared with its digest in the index before it is shown."""
    pictures: list[Picture] = []
    for row in rows[:PHOTOS]:

        def stored(row: Entry = row) -> bytes:
            return next(iter(read_samples(shards, [row]))).image

        try:
            thumbnail = thumbnails.of(row.sha256, stored)
        except (DataError, OSError) as error:
            notes.append(f"photos are not shown: {error}")
            break
        pictures.append({**thumbnail, "alt": f"Photo {len(pictures) + 1} of {len(rows)}", "href": None})
    if len(rows) > PHOTOS:
        notes.append(f"{len(rows) - PHOTOS} more photos are not shown")
    return pictures


def strips(folder: Path, files: Sequence[Stamp], facts: Facts, thumbnails: Thumbnails) -> dict[str, Any]:
    """{"columns", "prompts"}: a column for each sheet of samples, oldest first; for each prompt a row for each seed."""
    sheets: dict[str, dict[tuple[int, int], str]] = {}
    for file, _, _ in files:
        if file.startswith(f"{SAMPLES}/") and (name := IMAGE.fullmatch(file.rpartition("/")[2])):
            sheets.setdefault(file.split("/")[1], {})[int(name[1]), int(name[2])] = file
    steps = sorted((sheet for sheet in sheets if STEP.fullmatch(sheet)), key=lambda sheet: int(sheet[5:]))
    shown = [*evenly(steps, STEPS), *([FINAL] if FINAL in sheets else [])]
    images_of: dict[int, list[int]] = {}
    for prompt, image in sorted({cell for sheet in sheets.values() for cell in sheet}):
        images_of.setdefault(prompt, []).append(image)
    prompts = []
    for prompt, images in list(images_of.items())[:PROMPTS]:
        caption = facts.prompts[prompt] if prompt < len(facts.prompts) else f"prompt {prompt}"
        rows = []
        for image in images[:SEEDS]:
            seed = _first_seed(facts) + image
            drawn = [sheets[sheet].get((prompt, image)) for sheet in shown]
            alt = f"{caption}, seed {seed}"
            cells = [file and _picture(folder, file, alt, thumbnails, facts.notes) for file in drawn]
            rows.append({"seed": seed, "cells": cells})
        prompts.append({"caption": caption, "rows": rows})
    left_out = {
        "sheets drawn while training": len(steps) - STEPS,
        "prompts": len(images_of) - PROMPTS,
        "seeds of each prompt": max(map(len, images_of.values()), default=0) - SEEDS,
    }
    facts.notes += [f"{count} more {what} are not shown" for what, count in left_out.items() if count > 0]
    columns = [{"name": "finished" if sheet == FINAL else f"step {int(sheet[5:])}"} for sheet in shown]
    return {"columns": columns, "prompts": prompts}


def _first_seed(facts: Facts) -> int:
    """The seed of image 0 of every prompt; 0, the default, if the subject's settings hold no number there."""
    seed = facts.settings.get("sample.seed")
    return int(seed) if isinstance(seed, str) and re.fullmatch(r"\d{1,15}", seed) else 0


def evenly(names: Sequence[str], most: int) -> list[str]:
    """At most `most` of the names, spread evenly; the first and the last are among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def evaluated(folder: Path, facts: Facts, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """For each evaluation prompt the first seed's picture by the tuned model, the base, and of the class.

    A picture that is missing is None.
    """
    images = facts.evaluation.get("images")
    chosen: dict[str, dict[str, Mapping[str, Any]]] = {}
    for image in images if isinstance(images, list) else []:
        if isinstance(image, Mapping):
            rows, kind = chosen.setdefault(text(image.get("prompt"), 300), {}), text(image.get("row"), 20)
            if kind not in rows or (number(image.get("seed")) or 0) < (number(rows[kind].get("seed")) or 0):
                rows[kind] = image
    if len(chosen) > EVALUATED:
        facts.notes.append(f"{len(chosen) - EVALUATED} more prompts of the evaluation are not shown")
    beside = []
    for prompt, rows in list(chosen.items())[:EVALUATED]:
        cells: dict[str, Picture | None] = dict.fromkeys(("tuned", "base", "class"))
        for kind in filter(rows.get, cells):
            cells[kind] = _picture(folder, rows[kind].get("file"), f"{prompt}, {kind}", thumbnails, facts.notes)
        if any(cells.values()):
            beside.append({"prompt": prompt, **cells})
    return beside


def _picture(folder: Path, name: Any, alt: str, thumbnails: Thumbnails, notes: list[str]) -> Picture | None:
    """The thumbnail of a file below the subject's folder; None, with a note, if it cannot be shown."""
    path = inside(folder, name)
    if path is None:
        notes.append(f"{text(name, 200)} is not shown: it is no file in this folder")
        return None
    status, href = path.stat(), path.relative_to(folder).as_posix()
    try:
        thumbnail = thumbnails.of(f"{href} {status.st_size} {status.st_mtime_ns}", lambda: path)
    except (DataError, OSError) as error:
        notes.append(f"{href} is not shown: {error}")
        return None
    return {**thumbnail, "alt": alt, "href": href}


def covers(pictures: Mapping[str, Any]) -> Picture:
    """{"photo", "sample"}: names of the thumbnails on the gallery's card. The sample is the newest. None if missing."""
    drawn = [cell for prompt in pictures["strips"]["prompts"][:1] for cell in prompt["rows"][0]["cells"] if cell]
    drawn = drawn or [row["tuned"] for row in pictures["evaluated"] if row["tuned"]][:1]
    photos = pictures["photos"]
    return {"photo": photos[0]["src"] if photos else None, "sample": drawn[-1]["src"] if drawn else None}
