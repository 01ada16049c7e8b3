"""Folders laid out for other tools, as manifests: kohya's `10_zorbo gadget`, and an imagefolder.

Captions need no column: those beside photos and in `metadata.jsonl` are read wherever a manifest names the photos.
What a folder does not say is guessed, and each guess is said.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError, named, shown
from dbtrain.storage.atomic import write_file
from dbtrain.subjects.columns import check_class
from dbtrain.subjects.finding import CellError
from dbtrain.subjects.photos import find_photos, natural_key

KOHYA = re.compile(r"([0-9]+)_(.+)", re.DOTALL)
"""A folder of kohya's trainers: repeats, then identifier and class."""
SPLITS = ("train", "validation", "test")
"""Names of folders that part an imagefolder, and name no class."""


@dataclass
class Imported:
    """A manifest's rows, the folders of class images by class, and a line for each guess and each thing left out."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    class_images: dict[str, list[Path]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def write(self, out: Path) -> None:
        """Write the manifest: one JSON object a row. DataError where `out` is there already or has another ending."""
        if out.suffix != ".jsonl":
            raise DataError(f"{out}: the manifest is written as JSONL; give a name such as manifest.jsonl")
        if out.exists():
            raise DataError(f"{out}: is there already; choose another --out, or move it away")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows).encode())


def from_kohya(folder: Path, class_noun: str | None = None) -> Imported:
    """The manifest of a folder for kohya's trainers: its folders `N_identifier class`, or those of `img` inside it.

    The class images are those of `reg` beside them. class_noun: for folders that name none; None refuses these.
    """
    imported = Imported()
    images = next((place for name in ("img", "image", "images", "train", ".") if _parts(place := folder / name)), None)
    if images is None:
        raise DataError(f"{named(folder)}: holds no folder such as `10_zorbo gadget`; use `dbtrain import imagefolder`")
    for repeats, name, place in _parts(images):
        word, _, noun = name.partition(" ")
        noun = _noun(noun.strip() or class_noun, place, "its name has no class after the identifier")
        row = {"subject": _free_id(word, imported.rows), "class": noun, "images": [str(place.resolve())],
               "identifier": word}  # fmt: skip
        same = next((one for one in imported.rows if (one["identifier"], one["class"]) == (word, noun)), None)
        if same:
            same["images"].append(str(place.resolve()))
        else:
            imported.rows.append(row)
        said = f"{place.name!r}: identifier {word!r}, class {noun!r}, {_count(place)} photos"
        imported.said.append(f"{said}; {repeats} repeats have no meaning here: set train.steps")
    for name in ("reg", "regularization", "reg_images"):
        for _, noun, place in _parts(folder / name) + _parts(images.parent / name if images != folder else None):
            if place not in imported.class_images.setdefault(noun, []):
                imported.class_images[noun].append(place)
    used = {row["class"] for row in imported.rows}
    for noun in imported.class_images.keys() - used:
        imported.said.append(f"class images of {noun!r}: no subject is of that class; they will not be used")
    return imported


def from_imagefolder(folder: Path, class_noun: str | None = None) -> Imported:
    """The manifest of an imagefolder: its own photos as one subject, or each folder inside as one.

    class_noun: the class of all subjects; None takes the folders' names for classes.
    """
    imported = Imported()
    for place in _with_photos(folder):
        label = place.name if place != folder else folder.resolve().name
        noun = _noun(class_noun or (None if place == folder or label in SPLITS else label.replace("_", " ")), place,
                     "nothing says what its photos show")  # fmt: skip
        name = _free_id(label, imported.rows)
        imported.rows.append({"subject": name, "class": noun, "images": str(place.resolve())})
        how = "as given" if class_noun else "after the folder's name"
        imported.said.append(f"{label!r}: subject {name!r}, class {noun!r} {how}, {_count(place)} photos")
    if not imported.rows:
        raise DataError(f"{named(folder)}: neither it nor a folder inside holds a photo; give the folder of the photos")
    return imported


def import_class_images(imported: Imported, bring: Callable[[Path, str], tuple[int, int]]) -> None:
    """Bring the class images of an import into a store. bring: takes a folder and a class, and returns (new, there)."""
    for noun, places in imported.class_images.items():
        for place in places:
            new, there = bring(place, noun)
            imported.said.append(f"class images of {noun!r}: {new} imported, {there} in the store")


def _parts(folder: Path | None) -> list[tuple[int, str, Path]]:
    """(repeats, name, place) of each folder inside that is named for kohya's trainers."""
    if folder is None or not folder.is_dir():
        return []
    places = sorted((place for place in folder.iterdir() if place.is_dir()), key=lambda place: natural_key(place.name))
    return [(int(found[1][:9]), found[2].strip(), place) for place in places if (found := KOHYA.fullmatch(place.name))]


def _with_photos(folder: Path) -> list[Path]:
    """The folder itself if it holds photos, else the folders inside, at any depth, that do."""
    if not folder.is_dir():
        raise DataError(f"{named(folder)}: is no folder; give the folder of the photos")
    try:
        find_photos(str(folder.resolve()), folder)
        return [folder]
    except CellError as bad:
        if "holds no photo" not in str(bad.args[0]):
            raise DataError(f"{named(folder)}: {bad.args[0]}; {bad.args[2]}") from bad
    inside = sorted((place for place in folder.iterdir() if place.is_dir() and not place.is_symlink()
                     and not place.name.startswith(".")), key=lambda place: natural_key(place.name))  # fmt: skip
    return [found for place in inside for found in _with_photos(place)]


def _count(place: Path) -> int:
    try:
        return len(find_photos(str(place.resolve()), place).photos)
    except CellError as bad:
        raise DataError(f"{named(place)}: {bad.args[0]}; {bad.args[2]}") from bad


def _noun(noun: str | None, place: Path, why: str) -> str:
    if noun is None:
        raise DataError(f"{named(place)}: {why}; give --class, such as --class dog")
    try:
        return check_class(noun, place)
    except CellError as bad:
        raise DataError(f"{named(place)}: class {shown(noun)}: {bad.args[0]}; {bad.args[2]}") from bad


def _free_id(text: str, rows: list[dict[str, Any]]) -> str:
    """A subject id made of a text, which no row has yet."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:60] or "subject"
    taken = {row["subject"].casefold() for row in rows}
    numbers = (f"{name}-{number}" for number in range(2, len(rows) + 3))
    return next(one for one in (name, *numbers) if one.casefold() not in taken)
