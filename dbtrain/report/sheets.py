"""The pictures of a subject's page: its photos, its samples by step at fixed seeds, and the base model beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dbtrain.data.index import Entry, Index
from dbtrain.data.stream import read_samples
from dbtrain.errors import DataError
from dbtrain.report.facts import Facts
from dbtrain.report.pictures import Thumbnails, attempt
from dbtrain.report.reading import FINAL, IMAGE, SAMPLES, STEP, Stamp, inside, number, text

PHOTOS, STEPS, PROMPTS, SEEDS = 12, 8, 8, 2
"""Most photos, sheets while training, prompts and seeds of a page; what is left out is said there."""
EVALUATED = 30
"""Most prompts of the evaluation on a page."""

Picture = dict[str, Any]


def photos(shards: Path, rows: Sequence[Entry], thumbnails: Thumbnails, notes: list[str]) -> list[Picture]:
    """The subject's photos as they were trained on, each proved by its digest in the index."""
    found: list[Picture] = []
    wanted = list(rows)[:PHOTOS]
    if all(thumbnails.has(each.sha256) for each in wanted):
        found = [thumbnails.of(each.sha256, bytes) for each in wanted]
    else:
        try:
            for each, sample in zip(wanted, read_samples(shards, wanted)):
                found.append(thumbnails.of(each.sha256, lambda image=sample.image: image))  # type: ignore[misc]
        except (DataError, OSError) as error:
            notes.append(f"photos are not shown: {error}")
    if len(rows) > PHOTOS:
        notes.append(f"{len(rows) - PHOTOS} more photos are not shown")
    return [{**picture, "alt": f"Photo {i + 1} of {len(rows)}", "href": None} for i, picture in enumerate(found)]


def load_index(shards: Path, notes: list[str]) -> Index | None:
    """The index of the run's photos, or None and a note."""
    if not shards.is_dir():
        return None
    try:
        return Index.load(shards)
    except DataError as error:
        notes.append(f"photos are not shown: {error}")
        return None


def strips(folder: Path, files: Sequence[Stamp], facts: Facts, thumbnails: Thumbnails) -> dict[str, Any]:
    """{"columns", "prompts"}: for each prompt a row of pictures for each seed, one a sheet, in training's order."""
    sheets: dict[str, dict[tuple[int, int], Stamp]] = {}
    for stamp in files:
        if stamp[0].startswith(f"{SAMPLES}/") and (name := IMAGE.fullmatch(stamp[0].rpartition("/")[2])):
            sheets.setdefault(stamp[0].split("/")[1], {})[int(name[1]), int(name[2])] = stamp
    steps = sorted((name for name in sheets if STEP.fullmatch(name)), key=lambda name: int(name[5:]))
    shown = [*evenly(steps, STEPS), *([FINAL] if FINAL in sheets else [])]
    cells = sorted({cell for sheet in sheets.values() for cell in sheet})
    first = _first_seed(facts)
    columns = [{"name": "finished" if name == FINAL else f"step {int(name[5:])}"} for name in shown]
    prompts = []
    for number_ in sorted({prompt for prompt, _ in cells})[:PROMPTS]:
        caption = facts.prompts[number_] if number_ < len(facts.prompts) else f"prompt {number_}"
        images = [image for prompt, image in cells if prompt == number_][:SEEDS]
        rows = [
            {
                "seed": first + image,
                "cells": [
                    _sample(
                        folder,
                        sheets[name].get((number_, image)),
                        f"{caption}, seed {first + image}",
                        thumbnails,
                        facts.notes,
                    )
                    for name in shown
                ],
            }
            for image in images
        ]
        prompts.append({"caption": caption, "rows": rows})
    left_out = {
        "sheets drawn while training": len(steps) - len(evenly(steps, STEPS)),
        "prompts": len({prompt for prompt, _ in cells}) - len(prompts),
        "seeds of each prompt": max(Counter(prompt for prompt, _ in cells).values(), default=0) - SEEDS,
    }
    facts.notes += [f"{count} more {what} are not shown" for what, count in left_out.items() if count > 0]
    return {"columns": columns, "prompts": prompts}


def _first_seed(facts: Facts) -> int:
    """The seed of image 0 of every prompt; 0, the default, where the subject's settings do not tell."""
    told = facts.settings.get("sample.seed")
    return int(told) if isinstance(told, str) and re.fullmatch(r"\d{1,15}", told) else 0


def evenly(names: Sequence[str], most: int) -> list[str]:
    """At most `most` of the names, spread evenly, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _sample(folder: Path, stamp: Stamp | None, alt: str, thumbnails: Thumbnails, notes: list[str]) -> Picture | None:
    if stamp is None:
        return None
    name, size, changed = stamp
    path = inside(folder, name)
    if path is None:
        notes.append(f"{name} is not shown: it is no file in this folder")
        return None
    found = attempt(lambda: thumbnails.of(f"{name} {size} {changed}", lambda: path), notes, name)
    return found and {**found, "alt": alt, "href": name}


def evaluated(folder: Path, facts: Facts, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """For each evaluation prompt the first seed's picture by the tuned model, the base and the class; None is none."""
    chosen: dict[str, dict[str, Mapping[str, Any]]] = {}
    for image in _images(facts.evaluation):
        rows = chosen.setdefault(text(image.get("prompt"), 300), {})
        before = rows.get(text(image.get("row"), 20))
        if before is None or (number(image.get("seed")) or 0) < (number(before.get("seed")) or 0):
            rows[text(image.get("row"), 20)] = image
    if len(chosen) > EVALUATED:
        facts.notes.append(f"{len(chosen) - EVALUATED} more prompts of the evaluation are not shown")
    found = []
    for prompt, rows in list(chosen.items())[:EVALUATED]:
        cells = {
            kind: _image(folder, rows.get(kind), f"{prompt}, {kind}", thumbnails, facts.notes)
            for kind in ("tuned", "base", "class")
        }
        if any(cells.values()):
            found.append({"prompt": prompt, **cells})
    return found


def _images(evaluation: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    found = evaluation.get("images")
    yield from (image for image in (found if isinstance(found, list) else []) if isinstance(image, Mapping))


def _image(
    folder: Path, image: Mapping[str, Any] | None, alt: str, thumbnails: Thumbnails, notes: list[str]
) -> Picture | None:
    if image is None:
        return None
    path = inside(folder, image.get("file"))
    if path is None:
        notes.append(f"{text(image.get('file'), 200)!r} of the evaluation is not shown: no such file in the folder")
        return None
    status, name = path.stat(), path.relative_to(folder).as_posix()
    identity = f"{name} {status.st_size} {status.st_mtime_ns}"
    found = attempt(lambda: thumbnails.of(identity, lambda: path), notes, name)
    return found and {**found, "alt": alt, "href": name}


def covers(photos: Sequence[Picture], strips: Mapping[str, Any], evaluation: Sequence[Mapping[str, Any]]) -> Picture:
    """{"photo", "sample"}: the thumbnail names of the gallery's card, the sample being the newest one; or None."""
    drawn = [cell for prompt in strips["prompts"][:1] for cell in prompt["rows"][0]["cells"] if cell]
    drawn = drawn or [row["tuned"] for row in evaluation if row["tuned"]][:1]
    return {"photo": photos[0]["src"] if photos else None, "sample": drawn[-1]["src"] if drawn else None}
