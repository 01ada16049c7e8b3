"""The page of a study: one file with its table, chart, effects, and the same pictures by the recipes of the front."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dbtrain.data.images import open_photo, read_photo
from dbtrain.errors import DataError
from dbtrain.evaluate import RESULT
from dbtrain.evaluate.scores import SCORES, title
from dbtrain.report.charts import LARGE, Chart, lines
from dbtrain.report.pages import environment
from dbtrain.report.photo_sheet import SIDE, thumbnail
from dbtrain.storage.atomic import write_file
from dbtrain.study.findings import SHOWN, Line, cell
from dbtrain.study.running import folder_of, read_json
from dbtrain.study.telling import Told

STYLES = ("report.css", "photos.css", "study.css")
MOST = 6
"""Most subjects, and most variants of the front, whose pictures are shown."""


def write_page(path: Path, told: Told) -> None:
    """Write the page."""
    templates, best = environment(), told.best
    css = "".join(templates.get_template(name).render() for name in STYLES)
    names = [name for name in SHOWN if all(name in line.means for line in told.table)]
    subjects = list(dict.fromkeys(row.subject for row in told.rows))
    page = templates.get_template("study.html").render(
        styles=STYLES,
        style=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        built=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        told=told,
        subjects=len(subjects),
        chart=scatter(told.table, best),
        heads=[(title(name), SCORES[name].meaning, SCORES[name].better) for name in names],
        lines=[
            {
                "title": line.variant.title,
                "best": line in best,
                "chosen": line is told.chosen,
                "cost": f"{line.cost:.2f}",
                "cells": [cell(line.means[name]) for name in names],
            }
            for line in told.table
        ],
        sheets=[sheet(told, subject, best[-MOST:]) for subject in subjects[:MOST]],
    )
    write_file(path, page.encode("utf-8", "replace"))


def scatter(table: Sequence[Line], best: Sequence[Line]) -> Chart:
    """Cost against identity: a dot for each variant, and the front as a line."""
    series = {"front": [(line.cost, line["dino"]) for line in best]}
    series |= {f"other {number}": [(line.cost, line["dino"])] for number, line in enumerate(table) if line not in best}
    said = ", ".join(f"{line['dino']:.3f} for {line.cost:.2f} s" for line in best)
    summary = f"Identity against device-seconds a subject; on the front: {said}"
    return lines("Identity by cost", series, summary, "DINO against device-seconds a subject", size=LARGE)


def sheet(told: Told, subject: str, best: Sequence[Line]) -> dict[str, Any]:
    """A subject's pictures of the same prompts and seeds, a row for each variant of the front."""
    shown: list[dict[str, Any]] = []
    prompts: list[str] = []
    for line in best:
        folder = folder_of(told.out, line.variant.name, subject)
        images: list[dict[str, str]] = read_json(folder / RESULT).get("images", [])
        drawn = [image for image in images if image["row"] in ("tuned", "class")]
        own = [*{image["told"]: image for image in reversed(drawn)}.values()][::-1]
        prompts = [image["told"] for image in own] or prompts
        row = next((row for row in told.rows if (row.variant, row.subject) == (line.variant.name, subject)), None)
        if row is not None:
            shown.append(
                {
                    "title": line.variant.title,
                    "facts": f"{row.cost_s:.2f} s, DINO {row.value('dino'):.3f}, PRES {row.value('pres'):.3f}",
                    "pictures": [_picture(folder / image["file"]) for image in own],
                }
            )
    photos = [_picture(path) for path in told.photos.get(subject, ())[: max(len(prompts), 1)]]
    return {"subject": subject, "prompts": prompts, "rows": shown, "photos": photos}


def _picture(path: Path) -> str:
    """A data address of a picture or photo in small; empty where it cannot be read."""
    try:
        return thumbnail(open_photo(read_photo(path)), None, (SIDE, SIDE))
    except DataError:
        return ""
