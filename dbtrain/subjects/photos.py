"""Which photos a manifest's cell names: files, folders, globs and lists of them; and which files are not used, and why.

What a file is, its content says. Only the start of a file is read, and only where its name does not say "photo".
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbtrain.data.formats import OTHER_SUFFIXES, RAW_SUFFIXES, START, SUFFIXES, missing, picture_kind, readable
from dbtrain.errors import named, shown
from dbtrain.subjects.captions import METADATA, SIDECARS, Caption, captions_beside
from dbtrain.subjects.finding import CellError

IMAGES = ("a folder, a glob or a list of files", "give paths relative to the manifest's folder")
"""What the column `images` wants, and what to do where it is something else."""
JUNK = re.compile(r"(thumbs|ehthumbs)\.db|desktop\.ini|\.DS_Store|\._.*|@eaDir|__MACOSX|icon\r", re.IGNORECASE)
"""Names of what systems leave in folders."""
LEFT_OVER = re.compile(r".*(~|\.bak|\.orig|\.tmp|\.part|\.crdownload)", re.IGNORECASE | re.DOTALL)
KOHYA = re.compile(r"[0-9]+_.+", re.DOTALL)
"""How a folder is named for kohya's trainers: repeats, then identifier and class."""
NAMED = 12
"""Most files that one note names one by one."""
TEXT_SUFFIXES = (*SIDECARS, ".json", ".npz", ".xmp")


@dataclass
class Found:
    """What a cell names. captions: those that lie beside the photos. unused: names of files by the reason."""

    photos: list[Path] = field(default_factory=list)
    captions: dict[Path, Caption] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, name: str, reason: str) -> None:
        """Note a file that is not used."""
        self.unused.setdefault(reason, []).append(name)

    def notes(self) -> Iterator[tuple[str, str]]:
        """(what, remedy) of each reason why files are not used."""
        for reason, names in self.unused.items():
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            yield f"not used: {', '.join(shown(name) for name in names[:NAMED])}{more}", reason


def natural_key(text: str) -> tuple:
    """A sort key by which `photo2` comes before `photo10`. Ties are broken by the text itself."""
    parts = re.split(r"([0-9]+)", text.casefold())
    return tuple((int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in parts), text


def photos_of(cell: Any, folder: Path, masks: bool = False) -> tuple[Path, ...]:
    """The photos of a cell, a text or a list of texts, in natural order. Relative paths start in `folder`.

    masks: whether masks beside photos count too.
    """
    return tuple(find_photos(cell, folder, masks).photos)


def find_photos(cell: Any, folder: Path, masks: bool = False) -> Found:
    """The photos of a cell, as `photos_of`, with their captions and what lies beside them unused."""
    cells = cell if isinstance(cell, list) else [cell]
    if not all(isinstance(part, str) and part and "\0" not in part for part in cells):
        raise CellError(f"got {shown(cell)}", *IMAGES)
    found = Found()
    try:
        for part in cells:
            _add(found, part, folder)
    except OSError as error:
        raise CellError(f"got {shown(cell)} ({error.strerror})", *IMAGES) from error
    if not masks:
        found.photos = [photo for photo in found.photos if not is_mask(photo)]
    if not found.photos:
        raise CellError(f"got {shown(cell)}, which names no photo", *IMAGES)
    twice = [photo for photo, count in _counts(found.photos) if count > 1]
    if twice:
        raise CellError(f"names {twice[0]} twice", "each photo once", "take one of the two out")
    found.photos.sort(key=lambda photo: natural_key(str(photo)))
    names = {parent: os.listdir(parent) for parent in {photo.parent for photo in found.photos}}
    found.captions, absent = captions_beside(found.photos, names)
    for table, files in absent.items():
        found.unused[f"{table} has captions for them, and they are not beside it"] = files
    return found


def is_mask(path: Path) -> bool:
    """Whether a file is the mask `X-mask.png` of a photo X beside it. Without such a photo it is a photo itself."""
    photo = path.name.casefold().removesuffix("-mask.png")
    if len(photo) == len(path.name):
        return False
    name = path.name[: len(photo)]
    return any(path.with_name(name + end).is_file() for end in (*SUFFIXES, *map(str.upper, SUFFIXES)))


def _counts(photos: list[Path]) -> Iterable[tuple[Path, int]]:
    counts: dict[Path, int] = {}
    for photo in photos:
        counts[photo] = counts.get(photo, 0) + 1
    return counts.items()


def _add(found: Found, text: str, folder: Path) -> None:
    """Add the photos that a text names: what exists under that very name, else a semicolon list, else a glob."""
    path = folder / text
    if path.is_dir():
        entries = sorted(path.iterdir(), key=lambda entry: natural_key(entry.name))
        _sort_out(found, entries, f"the folder {shown(text)}")
    elif path.exists() or path.is_symlink():
        found.photos.append(_photo(path))
    elif ";" in text:
        for part in text.split(";"):
            if part.strip():
                _add(found, part.strip(), folder)
    elif glob.has_magic(text):
        names = sorted(glob.glob(_pattern(text, folder), root_dir=folder, recursive=True), key=natural_key)
        if not names and (cause := _cause(text, folder)):
            raise CellError(*cause)
        _sort_out(found, [folder / name for name in names], f"the pattern {shown(text)}")
    else:
        raise CellError(*(_cause(text, folder) or (f"got {shown(text)}, which does not exist", *IMAGES)))


def _pattern(text: str, folder: Path) -> str:
    """The glob with an image ending in any case. Brackets in names of folders that exist stand for themselves."""
    parts = text.split("/")
    number = 0
    while number < len(parts) - 1 and (folder / "/".join(parts[: number + 1])).exists():
        number += 1
    *start, stem = [*map(glob.escape, parts[:number]), "/".join(parts[number:])]
    end = next((end for end in SUFFIXES if stem.lower().endswith(end)), "")
    letters = "".join(f"[{one.lower()}{one.upper()}]" if one.isalpha() else one for one in end)
    return "/".join([*start, stem[: len(stem) - len(end)] + letters])


def _cause(text: str, folder: Path) -> tuple[str, str, str] | None:
    """(what, want, remedy) where it shows why nothing is found under a name; None where nothing shows it."""
    got, want, _ = f"got {shown(text)}", *IMAGES
    if text.startswith("~"):
        return f"{got}: ~ is not replaced in a manifest", want, "write the whole path, or one relative to the manifest"
    if re.search(r"\$\{?[A-Za-z_]\w*|%\w+%", text):
        return f"{got}: variables are not replaced in a manifest", want, "write the path itself"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        return f"{got}, an address", want, "copy the photos to this machine, or make shards where they are"
    if re.match(r"\[\s*['\"]", text):
        return f"{got}, a list as a program prints it", want, "separate files by semicolons, or use JSONL"
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return f"{got}: the quotes are part of the name", want, "take them out"
    if "\\" in text:
        slashes = text.replace("\\", "/")
        there = " (which exists here)" if not glob.has_magic(slashes) and (folder / slashes).exists() else ""
        return f"{got}: folders are separated by / here", want, f"write {shown(slashes)}{there}"
    return None


def _sort_out(found: Found, paths: list[Path], where: str) -> None:
    """Add the photos among the entries of a folder or pattern, and note every other entry with its reason."""
    before, folders = len(found.photos), []
    stems = {path.stem for path in paths if path.suffix.lower() in SUFFIXES}
    for path in paths:
        suffix = path.suffix.lower()
        if JUNK.fullmatch(path.name):
            found.leave(path.name, "a file that a system leaves in folders; nothing needs to be done")
        elif path.name.startswith("."):
            found.leave(path.name, "hidden by its name; rename it if it is a photo")
        elif path.is_dir():
            folders.append(path.name)
        elif suffix in readable_suffixes():
            found.photos.append(_photo(path))
        elif (suffix in TEXT_SUFFIXES and path.stem in stems) or path.name in METADATA:
            if suffix not in (*SIDECARS, ".jsonl", ".csv", ".parquet"):
                found.leave(path.name, "another program's; captions are read from .txt, .caption and metadata.jsonl")
        else:
            _sort_out_content(found, path, where, stems)
    if len(found.photos) == before:
        raise CellError(f"{where} holds no photo{_inside(folders)[0]}", "JPEG, PNG or WebP photos", _inside(folders)[1])
    for name in folders:
        found.leave(name, "a folder inside; name it too, or use a pattern such as FOLDER/**/*.jpg, if it belongs here")


def _sort_out_content(found: Found, path: Path, where: str, stems: set[str]) -> None:
    """Add a file whose name does not say "photo" if its content does, or note why it is not used."""
    suffix = path.suffix.lower()
    kind = _kind(path)
    if kind in readable() and not LEFT_OVER.fullmatch(path.name):
        found.photos.append(_photo(path))
        return
    if suffix in RAW_SUFFIXES and kind in (None, "TIFF", "raw"):
        kind = "raw"
    if kind == "raw" and path.stem in stems:
        found.leave(path.name, "a raw photo beside the developed one, which is used")
    elif LEFT_OVER.fullmatch(path.name):
        found.leave(path.name, "a left-over of another file, by its name; rename it if it is a photo")
    elif kind or suffix in OTHER_SUFFIXES or suffix in SUFFIXES:
        kind = kind or {".heic": "HEIC", ".heif": "HEIC", ".hif": "HEIC", ".avif": "AVIF"}.get(suffix)
        what = "a raw photo" if kind == "raw" else f"{kind or 'a picture'} that is not read here"
        raise CellError(f"{where} holds {shown(path.name)}, {what}", "JPEG, PNG or WebP photos", missing(kind))
    elif suffix in SIDECARS:
        found.leave(path.name, "a caption without a photo of its name")
    else:
        found.leave(path.name, "no picture, by its content")


def _inside(folders: list[str]) -> tuple[str, str]:
    """(what, remedy) for a place without a photo that holds these folders."""
    if any(KOHYA.fullmatch(name) for name in folders):
        return ", but folders as kohya's trainers want them", "run `dbtrain import kohya FOLDER --out manifest.jsonl`"
    if folders:
        what = f", but folders such as {shown(folders[0])}"
        return what, "name one of them, use FOLDER/*/*, or run `dbtrain import imagefolder FOLDER --out manifest.jsonl`"
    return "", "put 3-5 photos of the subject there"


def _kind(path: Path) -> str | None:
    """The format of a picture by its content; None for anything else, and for what cannot be read."""
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            return picture_kind(file.read(START))
    except OSError:
        return None


def readable_suffixes() -> tuple[str, ...]:
    """Endings of the photos that are read here."""
    unread = {"HEIC": (".heic", ".heif", ".hif"), "AVIF": (".avif",)}
    absent = [end for kind, ends in unread.items() if kind not in readable() for end in ends]
    return tuple(end for end in SUFFIXES if end not in absent)


def _photo(path: Path) -> Path:
    if not path.is_file():
        raise CellError(f"{named(path)} is not a regular file", "photo files", "copy the photo itself there")
    if path.suffix.lower() in readable_suffixes():
        return path
    kind = _kind(path)
    if kind not in readable():
        raw = path.suffix.lower() in RAW_SUFFIXES
        what = f"got {shown(path.name)}" + (f", {kind} by its content" if kind and not raw else "")
        raise CellError(what, "a JPEG, PNG or WebP photo", missing("raw" if raw else kind))
    return path
