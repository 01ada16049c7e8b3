"""Which photos a manifest's cell names: files, folders, globs and lists of them. No photo is opened."""

import glob
import re
from pathlib import Path
from typing import Any

from dbtrain.data.images import SUFFIXES
from dbtrain.errors import shown
from dbtrain.subjects.finding import CellError

IMAGES = ("a folder, a glob or a list of files", "give paths relative to the manifest's folder")
"""What the column `images` wants, and what to do where it is something else."""
FOREIGN = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl", ".jp2", ".dng", ".cr2", ".nef", ".arw")
"""Endings of pictures that dbtrain does not read. Such a file in a folder is an error, not silently left out."""


def natural_key(text: str) -> tuple:
    """A sort key by which `photo2` comes before `photo10`. Ties are broken by the text itself."""
    parts = re.split(r"([0-9]+)", text.casefold())
    return tuple((int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in parts), text


def photos_of(cell: Any, folder: Path, masks: bool = False) -> tuple[Path, ...]:
    """The photos of a cell, a text or a list of texts, in natural order. Relative paths start in `folder`.

    masks: whether masks beside photos count too.
    """
    cells = cell if isinstance(cell, list) else [cell]
    if not all(isinstance(part, str) and part and "\0" not in part for part in cells):
        raise CellError(f"got {shown(cell)}", *IMAGES)
    try:
        photos = [photo for part in cells for photo in photos_at(part, folder) if masks or not is_mask(photo)]
    except OSError as error:
        raise CellError(f"got {shown(cell)} ({error.strerror})", *IMAGES) from error
    if not photos:
        raise CellError(f"got {shown(cell)}, which names no photo", *IMAGES)
    twice = [photo for photo in photos if photos.count(photo) > 1]
    if twice:
        raise CellError(f"names {twice[0]} twice", "each photo once", "take one of the two out")
    return tuple(sorted(photos, key=lambda photo: natural_key(str(photo))))


def is_mask(path: Path) -> bool:
    """Whether a file is the mask `X-mask.png` of a photo X beside it. Without such a photo it is a photo itself."""
    photo = path.name.casefold().removesuffix("-mask.png")
    if len(photo) == len(path.name):
        return False
    name = path.name[: len(photo)]
    return any(path.with_name(name + end).is_file() for end in (*SUFFIXES, *map(str.upper, SUFFIXES)))


def photos_at(text: str, folder: Path) -> list[Path]:
    """The photos that a text names: what exists under that very name, else a semicolon list, else a glob."""
    path = folder / text
    if path.is_dir():
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        return _only_photos(sorted(entries, key=lambda entry: natural_key(entry.name)), f"the folder {shown(text)}")
    if path.exists() or path.is_symlink():
        return [_photo(path)]
    if ";" in text:
        return [photo for part in text.split(";") if part.strip() for photo in photos_at(part.strip(), folder)]
    if glob.has_magic(text):
        names = sorted(glob.glob(text, root_dir=folder, recursive=True), key=natural_key)
        return _only_photos([folder / name for name in names], f"the pattern {shown(text)}")
    raise CellError(f"got {shown(text)}, which does not exist", *IMAGES)


def _only_photos(paths: list[Path], where: str) -> list[Path]:
    foreign = [path for path in paths if path.suffix.lower() in FOREIGN]
    if foreign:
        what = f"{where} holds {shown(foreign[0].name)}"
        raise CellError(what, "JPEG, PNG or WebP photos", "convert it, or move it elsewhere")
    photos = [_photo(path) for path in paths if path.suffix.lower() in SUFFIXES]
    if not photos:
        want = f"files ending in {', '.join(SUFFIXES)}"
        raise CellError(f"{where} holds no photo", want, "put 3-5 photos of the subject there")
    return photos


def _photo(path: Path) -> Path:
    if not path.is_file():
        raise CellError(f"{shown(str(path))} is not a regular file", "photo files", "copy the photo itself there")
    if path.suffix.lower() not in SUFFIXES:
        want = f"files ending in {', '.join(SUFFIXES)}"
        raise CellError(f"got {shown(path.name)}", want, "convert the photo, or correct its name")
    return path
