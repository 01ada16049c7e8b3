"""Which mask belongs to which photo: the column `mask`, a `*-mask.png` beside the photo, or its own transparency."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dbtrain.data.buckets import shape_of
from dbtrain.data.images import fit, may_be_transparent, open_with_alpha, read_photo, square
from dbtrain.data.masks import EMPTY, MARKED, fitted, open_mask
from dbtrain.errors import DataError, shown
from dbtrain.settings.config import DataConfig
from dbtrain.subjects.finding import CellError, Finding
from dbtrain.subjects.photos import photos_of
from dbtrain.values import Subject

ENDING = "-mask"
"""End of the name of a mask beside its photo, before `.png`."""
COLUMN = ("a folder, a glob or a list of masks", "name each mask as its photo, or its photo and `-mask`")


def masks_of(cell: Any, folder: Path) -> tuple[Path, ...]:
    """The masks of a cell of the column `mask`, named as photos are in `images`."""
    try:
        return photos_of(cell, folder, masks=True)
    except CellError as bad:
        raise CellError(bad.args[0], *COLUMN) from bad


def mask_file(subject: Subject, photo: Path) -> Path | None:
    """The file of a photo's mask: of the column, else beside the photo; None if there is none."""
    if len(subject.masks) == len(subject.images) == 1:
        return subject.masks[0]
    named = [mask for mask in subject.masks if mask.stem in (photo.stem, photo.stem + ENDING) and mask != photo]
    beside = [path for end in (".png", ".PNG") if (path := photo.with_name(photo.stem + ENDING + end)).is_file()]
    return next(iter(named + beside), None)


def astray(subject: Subject) -> list[Finding]:
    """A finding for each mask of the column that belongs to no photo, or shares its photo with another."""
    taken = {mask_file(subject, photo) for photo in subject.images}
    what = "is a mask of none of the subject's photos, or of one that has a mask already"
    return [Finding(subject.id, str(mask), what, COLUMN[1]) for mask in subject.masks if mask not in taken]


def open_with_mask(
    subject: Subject, photo: Path, content: bytes, data: DataConfig
) -> tuple[Image.Image, Image.Image | None]:
    """(a photo, its mask in the same size), both upright; None without a mask, or where it is white all over.

    DataError names the photo or the mask that is unusable. `content` is that of the photo's file.
    """
    try:
        image, alpha = open_with_alpha(content, data.max_pixels, srgb=data.srgb)
    except DataError as error:
        raise DataError(f"{photo}: {str(error).removeprefix('photo: ')}") from error
    if data.mask is False:
        return image, None
    path = mask_file(subject, photo)
    place = photo if path is None else path
    try:
        mask = alpha if path is None else fitted(open_mask(read_photo(path)), image.size)
        if mask is None:
            _refuse_unmasked(photo, data)
            return image, None
        _refuse_empty(mask, data)
    except DataError as error:
        raise DataError(f"{place}: {str(error).removeprefix('photo: ').removeprefix(f'{place}: ')}") from error
    return image, None if mask.getextrema()[0] == 255 else mask


def _refuse_unmasked(photo: Path, data: DataConfig) -> None:
    """Raise DataError if each photo must have a mask."""
    if data.mask is True:
        remedy = f"put {shown(photo.stem + ENDING + '.png')} beside it, or set data.mask=auto"
        raise DataError(f"has no mask, data.mask is true; {remedy}")


def _refuse_empty(mask: Image.Image, data: DataConfig) -> None:
    """Raise DataError if nothing is marked in the part of the photo that is trained."""
    trained = np.asarray(mask)
    if data.crop == "center":
        side = min(mask.size)
        # Families differ in their buckets by a few pixels, which is nothing here.
        trained = fit(mask, shape_of(mask.size, data)) if data.buckets else square(mask, side)
    if trained.max() < MARKED:
        raise DataError(EMPTY)


def mask_source(subject: Subject, photo: Path, content: bytes, data: DataConfig) -> bytes | None:
    """Bytes that change when a photo's mask does; None if it has none. `content` is that of the photo's file."""
    if data.mask is False:
        return None
    path = mask_file(subject, photo)
    if path is not None:
        return read_photo(path)
    # The photo's own digest covers its transparency; these bytes say only that it is used.
    transparent = may_be_transparent(content) and open_with_alpha(content, data.max_pixels, srgb=False)[1] is not None
    return b"alpha" if transparent else None
