"""The preflight sheet: one page with every subject's photos as they will be trained, and what is wrong with them.

The page is one file. Thumbnails are part of it, nothing in it runs, and it is written subject by subject, so that its
size does not matter to memory.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from dbtrain.data.buckets import Shape, covering, lost, shape_of
from dbtrain.data.images import fit, read_photo
from dbtrain.data.prefetch import ahead
from dbtrain.errors import DataError, named
from dbtrain.families import FAMILIES
from dbtrain.report.pages import environment
from dbtrain.settings.config import DataConfig, RunConfig
from dbtrain.storage.atomic import write_file
from dbtrain.subjects.finding import Finding, defects
from dbtrain.subjects.masks import mask_file, open_with_mask
from dbtrain.values import Subject

STYLES = ("report.css", "photos.css")
SIDE = 192
"""Side of a square thumbnail in pixels; others have about its area."""
QUALITY = 82
OUTLINE = (255, 0, 140)
"""Colour of a mask's outline: one that photos seldom have."""
CROPPED = 0.2
"""Share of the long side above which the sheet warns of what the crop leaves out."""


@dataclass(frozen=True)
class Shown:
    """One photo on the sheet. picture: a data address of its thumbnail; empty for a photo that cannot be trained.

    facts: its size and what happens to it. warnings: what a person should look at; findings come first.
    caption: its own; empty where it has that of its subject.
    """

    name: str
    picture: str
    facts: str
    warnings: tuple[str, ...]
    caption: str = ""


def write_sheet(path: Path, subjects: Sequence[Subject], findings: Sequence[Finding], config: RunConfig) -> None:
    """Write the sheet of these subjects. findings: all of `sift`; those of no photo stand with their subject, and those
    of no subject at the head of the page."""
    templates, known = environment(), {subject.id for subject in subjects}
    # The page's policy names its style sheet by this digest, so that no other style can come in.
    css = "".join(templates.get_template(name).render() for name in STYLES)
    page = templates.get_template("photos.html").stream(
        styles=STYLES,
        style=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        built=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        count=len(subjects),
        photos=sum(len(subject.images) for subject in subjects),
        bad=sorted({finding.subject for finding in defects(findings) if finding.subject in known}),
        loose=[finding.line() for finding in findings if finding.subject not in known],
        data=config.data,
        subjects=_parts(subjects, findings, config),
    )

    def write(file: BinaryIO) -> None:
        for piece in page:
            file.write(piece.encode("utf-8", "replace"))

    write_file(path, write)


def _parts(subjects: Sequence[Subject], findings: Sequence[Finding], config: RunConfig) -> Iterator[dict[str, Any]]:
    """The values of each subject's part of the page, in order."""
    of_subject: dict[str, list[Finding]] = {}
    for finding in findings:
        of_subject.setdefault(finding.subject, []).append(finding)
    pairs = ((subject, path) for subject in subjects for path in subject.images)
    data, multiple = config.data, FAMILIES[config.model.family].codec.multiple
    shown = ahead(lambda pair: _photo(*pair, of_subject.get(pair[0].id, []), data, multiple), pairs)
    for subject in subjects:
        captions = subject.captions or [""] * len(subject.images)
        photos = [replace(next(shown), caption=caption) for caption in captions]
        own = [finding for finding in of_subject.get(subject.id, []) if not _of_photo(finding, subject)]
        yield {
            "id": subject.id,
            "class_noun": subject.class_noun,
            "caption": subject.caption or data.caption,
            "identifier": subject.identifier,
            "findings": [f"{finding.file}: {finding.what}; {finding.remedy}" for finding in own],
            "photos": photos,
        }


def _of_photo(finding: Finding, subject: Subject) -> bool:
    """Whether a finding stands with one of the subject's photos."""
    return any(_is_about(finding, subject, path) for path in subject.images)


def _is_about(finding: Finding, subject: Subject, photo: Path) -> bool:
    """Whether a finding names a photo, or its mask."""
    return finding.file in (named(photo), named(mask_file(subject, photo)))


def _photo(subject: Subject, path: Path, findings: Sequence[Finding], data: DataConfig, multiple: int) -> Shown:
    """A photo as the sheet shows it. multiple: see `shape_of`."""
    wrong = tuple(f"{finding.what}; {finding.remedy}" for finding in findings if _is_about(finding, subject, path))
    try:
        image, mask = _image_and_mask(subject, path, data)
    except DataError as error:
        return Shown(path.name, "", "", wrong or (str(error),))
    shape = shape_of(image.size, data, multiple)
    facts, warnings = _facts(image, mask, shape, data)
    factor = SIDE / data.resolution
    small = (round(shape[0] * factor), round(shape[1] * factor))
    return Shown(path.name, thumbnail(image, mask, small), facts, wrong + warnings)


def _image_and_mask(subject: Subject, path: Path, data: DataConfig) -> tuple[Image.Image, Image.Image | None]:
    """A photo and its mask; the photo alone where its mask is at fault. DataError if the photo is."""
    content = read_photo(path)
    try:
        return open_with_mask(subject, path, content, data)
    except DataError:
        return open_with_mask(subject, path, content, data.replaced("mask", False))


def _facts(image: Image.Image, mask: Image.Image | None, shape: Shape, data: DataConfig) -> tuple[str, tuple[str, ...]]:
    """(size, shape, crop and mask of a photo in words, warnings)."""
    (width, height), covered = image.size, covering(image.size, shape)
    cut, facts, warnings = lost(image.size, shape), [f"{width}×{height}"], []
    if data.buckets:
        facts.append(f"trained at {shape[1]}×{shape[0]}")
    if round(cut, 3):
        facts.append(f"{cut:.0%} of its {'width' if covered[1] == shape[0] else 'height'} cropped")
    if cut > CROPPED and data.crop == "center":
        warnings.append(f"the crop leaves out {cut:.0%}: is all of the subject in it?")
    if min(image.size) < min(covered):
        side = f"{min(image.size)} to {min(covered)} px"
        warnings.append(f"is enlarged from {side}: use a larger photo if there is one")
    if mask is not None:
        facts.append(f"mask {fit(mask, shape).mean() / 255:.0%}")
    return ", ".join(facts), tuple(warnings)


def thumbnail(image: Image.Image, mask: Image.Image | None, shape: Shape) -> str:
    """A data address of a photo as it is trained, in a thumbnail's (height, width), with the outline of its mask."""
    pixels = fit(image, shape)
    if mask is not None:
        pixels = pixels.copy()
        pixels[outline(fit(mask, shape) >= 128)] = OUTLINE
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def outline(inside: np.ndarray) -> np.ndarray:
    """The pixels beside the edge of a region, on both sides of it."""
    edge = np.zeros_like(inside)
    for axis in (0, 1):
        # Neighbours of which one is inside and one is not.
        differ = np.diff(inside, axis=axis)
        before, after = [slice(None)] * 2, [slice(None)] * 2
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        edge[tuple(before)] |= differ
        edge[tuple(after)] |= differ
    return edge
