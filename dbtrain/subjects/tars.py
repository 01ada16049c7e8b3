"""Tars made elsewhere, in webdataset's layout, as a subject's samples: they are read once, proved, and stored as ours.

Our shards hold one photo and its provenance a sample, under digests, so a foreign tar cannot be used in its place.
Nothing is unpacked to disk, and no name of a member becomes a path.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from dbtrain.data.formats import START, SUFFIXES, picture_kind, readable
from dbtrain.data.images import MAX_BYTES, encode, open_photo, shorten
from dbtrain.data.index import FORMAT, INDEX_NAME, VERSION, Index, make_key
from dbtrain.data.shards import MARK, write_shards
from dbtrain.data.stream import verify
from dbtrain.errors import DataError, shown
from dbtrain.settings.config import DataConfig
from dbtrain.storage.atomic import file_digest
from dbtrain.subjects.captions import MAX_BYTES as MAX_TEXT
from dbtrain.subjects.captions import SIDECARS, TEXT_COLUMNS, check_caption
from dbtrain.subjects.finding import CellError
from dbtrain.subjects.prompts import names_subject
from dbtrain.values import OWN, Role, Sample

MEMBERS = 8
"""Most members of one sample that are looked at, so that a tar of one key fills no memory."""
NAMED = 12
"""Most members that a note names one by one."""
Member = tuple[str, bytes]
"""The name of a member without folders, and its content."""


def index_tars(
    paths: Sequence[Path], subject: str, class_noun: str, data: DataConfig, out: Path, say: Callable[[str], object]
) -> Index:
    """The index of shards made of tars; see `tar_samples`. The same tars again change nothing."""
    try:
        digests = [file_digest(path) for path in paths]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); give an uncompressed tar") from error
    about = ["tars", FORMAT, VERSION, data.resolution, data.srgb, subject, class_noun, *digests]
    source = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    if (out / INDEX_NAME).exists() and not (out / MARK).exists():
        made = Index.load(out)
        if made.source == source and not verify(out):
            say(f"{out}: is up to date; nothing to do")
            return made
    return write_shards(tar_samples(paths, subject, class_noun, data, say), out, source=source)


def tar_samples(
    paths: Sequence[Path], subject: str, class_noun: str, data: DataConfig, say: Callable[[str], object]
) -> Iterator[Sample]:
    """The photos of tars as a subject's samples, in their order; members with the same key are one sample.

    say: gets a line for members that are not used. DataError names the tar, the member, the defect and the remedy.
    """
    number = 0
    for path in paths:
        unused: list[str] = []
        for key, group in groupby(_members(path), key=lambda member: member[0].partition(".")[0]):
            members = list(islice(group, MEMBERS))
            photos = [one for one in members if picture_kind(one[1][:START]) in readable() or _is_photo(one[0])]
            if len(photos) > 1:
                raise DataError(f"{path}: {shown(key)} has {len(photos)} pictures; give each a key of its own")
            used = {photos[0][0]} if photos else set()
            if photos:
                where = f"{path}: {shown(photos[0][0])}"
                caption, source = _caption(path, members)
                used |= {source}
                yield _sample(photos[0], where, make_key(subject, Role.INSTANCE, number), class_noun, caption, data)
                number += 1
            unused += [name for name, _ in members if name not in used]
        if unused:
            more = f" and {len(unused) - NAMED} more" if len(unused) > NAMED else ""
            say(f"note: {path}: not used: {', '.join(map(shown, unused[:NAMED]))}{more}")
    if not number:
        raise DataError(f"{paths[0]}: holds no photo; give tars with members such as 0001.jpg and 0001.txt")


def _is_photo(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _members(path: Path) -> Iterator[Member]:
    """The plain files of a tar, one after another."""
    try:
        with tarfile.open(path, "r:") as file:
            for member in file:
                if member.isdir():
                    continue
                if not member.isreg():
                    raise DataError(f"{path}: {shown(member.name)} is no plain file; make the tar without links")
                if member.size > MAX_BYTES:
                    sizes = f"has {member.size / 2**20:.0f} MiB, the cap is {MAX_BYTES >> 20}"
                    raise DataError(f"{path}: {shown(member.name)} {sizes}; take it out")
                content = file.extractfile(member)
                assert content is not None, "a plain file has content"
                yield member.name.rpartition("/")[2], content.read()
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        remedy = "give an uncompressed tar, and copy it again if it is damaged"
        raise DataError(f"{path}: cannot be read as a tar ({shown(str(error))}); {remedy}") from error


def _caption(path: Path, members: Sequence[Member]) -> tuple[str, str]:
    """(caption, name of the member that has it) of a sample; empty texts where there is none."""
    for name, content in members:
        end = f".{name.rpartition('.')[2].lower()}"
        if end not in (*SIDECARS, ".json"):
            continue
        try:
            if len(content) > MAX_TEXT:
                raise ValueError(f"is larger than {MAX_TEXT} bytes")
            text = _from_json(json.loads(content)) if end == ".json" else content.decode("utf-8-sig")
            text = check_caption(" ".join(text.split()))
        except (ValueError, RecursionError) as error:
            what = f"no caption can be read ({shown(str(error))})"
            raise DataError(f"{path}: {shown(name)}: {what}; correct it, or take it out") from error
        except CellError as bad:
            what, want, remedy = bad.args
            raise DataError(f"{path}: {shown(name)}: {what}, want {want}; {remedy}") from bad
        if text:
            return (text if names_subject(text) else f"{{subject}}, {text}"), name
    return "", ""


def _from_json(values: Any) -> str:
    texts = [values.get(column) for column in TEXT_COLUMNS] if isinstance(values, dict) else []
    return next((text for text in texts if isinstance(text, str)), "")


def _sample(photo: Member, where: str, key: str, class_noun: str, caption: str, data: DataConfig) -> Sample:
    name, content = photo
    try:
        image = open_photo(content, data.max_pixels, srgb=data.srgb)
    except DataError as error:
        raise DataError(f"{where}: {str(error).removeprefix('photo: ')}") from error
    stored, extension = encode(shorten(image, data.resolution))
    meta = {
        "source": name,
        "source_sha256": hashlib.sha256(content).hexdigest(),
        "class": class_noun,
        "width": image.width,
        "height": image.height,
        **({OWN: True} if caption else {}),
    }
    return Sample(key, key.rpartition("-")[0].rpartition("-")[0], Role.INSTANCE, caption, stored, extension, meta)
