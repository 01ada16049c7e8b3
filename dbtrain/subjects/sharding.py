"""Photos of subjects as shards: written once, checked on later runs; and which subjects are left out, with reasons."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dbtrain.data.images import encode, encode_grey, read_photo, shorten
from dbtrain.data.index import FORMAT, INDEX_NAME, VERSION, Index, make_key
from dbtrain.data.prefetch import ahead
from dbtrain.data.shards import MARK, write_shards
from dbtrain.data.stream import SKIPPED, verify
from dbtrain.errors import DataError
from dbtrain.settings.config import DataConfig, RunConfig
from dbtrain.storage.atomic import write_file
from dbtrain.subjects.finding import Finding, refuse
from dbtrain.subjects.masks import mask_source, open_with_mask
from dbtrain.subjects.preflight import sift
from dbtrain.values import Role, Sample, Subject


def shard_subjects(
    subjects: Sequence[Subject],
    findings: Sequence[Finding],
    out: Path,
    config: RunConfig,
    say: Callable[[str], None] = print,
    skip_bad: bool = False,
    tokenizer: Any = None,
    registry: Path | None = None,
) -> Index:
    """The index of the shards that hold the subjects' photos at `data.resolution`.

    `subjects` and `findings` are what `scan_manifest` read. A second call with the same input changes nothing, or
    remakes what is damaged, and says so. Photos that are in the shards already are not decoded again. `tokenizer` and
    `registry` are those of `preflight`.

    Raises one DataError with all findings, those of `preflight` included, before anything is written. With `skip_bad`,
    subjects with findings are left out instead: `say` gets a line for each, and `skipped.json` the reasons. Raises
    DataError too where `out` was made from other input.
    """
    out, ready = Path(out), config.data.shards is not None
    made = Index.load(out) if not ready and (out / INDEX_NAME).exists() and not (out / MARK).exists() else None
    photos = not ready and (made is None or skip_bad)
    subjects, findings = sift(subjects, findings, config, tokenizer, registry, photos)
    if ready:
        return _ready_made(config.data, subjects, findings, out, skip_bad, say)
    left_out = _left_out(findings, skip_bad and bool(subjects), say)
    source = source_digest(subjects, config.data)
    if made is not None:
        damage = _repair_reason(made, source, out)
        if not damage:
            _name_left_out(out, left_out)
            say(f"{out}: is up to date, {len(made.entries)} samples of {len(made.subjects)} subjects; nothing to do")
            return made
        say("\n".join([*damage, f"{out}: is damaged; remaking it"]))
    index = write_shards(photo_samples(subjects, config.data), out, source=source, remake=made is not None)
    _name_left_out(out, left_out)
    say(f"{out}: {len(index.entries)} samples of {len(subjects)} subjects in {len(index.shards)} shards")
    return index


def _ready_made(
    data: DataConfig,
    subjects: list[Subject],
    findings: list[Finding],
    out: Path,
    skip_bad: bool,
    say: Callable[[str], None],
) -> Index:
    """The part of ready-made shards that holds these subjects. Nothing but `skipped.json` is written, into `out`."""
    place, remedy = str(data.shards), "shard its photos too, or take its row out"
    index = Index.load(place, data.schemes)
    absent = [subject for subject in subjects if not index.entries_of(subject.id)]
    findings = findings + [Finding(subject.id, place, "holds no photo of it", remedy) for subject in absent]
    sound = {subject.id for subject in subjects} - {subject.id for subject in absent}
    if data.mask is True and data.weighs:
        bare = sorted({entry.subject for entry in index.entries if entry.subject in sound and not entry.masked})
        remedy = "make the shards with masks, or set data.mask=auto"
        findings += [Finding(subject, place, "holds photos without a mask", remedy) for subject in bare]
        sound -= set(bare)
    left_out = _left_out(findings, skip_bad and bool(sound), say)
    if left_out:
        out.mkdir(parents=True, exist_ok=True)
        _name_left_out(out, left_out)
    entries = tuple(entry for entry in index.entries if entry.subject in sound and entry.role == Role.INSTANCE)
    say(f"{place}: {len(entries)} samples of {len(sound)} subjects")
    return Index(entries, index.shards, index.source)


def _left_out(findings: list[Finding], skip: bool, say: Callable[[str], None]) -> dict[str, list[str]]:
    """Reasons of the subjects that are left out, by id. Without `skip`, a DataError with all of them.

    A row without an id is named by its place in the manifest, such as photos.csv:4.
    """
    if not skip:
        refuse(findings)
    left_out: dict[str, list[str]] = {}
    for finding in findings:
        left_out.setdefault(finding.subject or Path(finding.file).name, []).append(finding.line())
        say(f"left out: {finding.line()}")
    return left_out


def photo_samples(subjects: Sequence[Subject], data: DataConfig) -> Iterator[Sample]:
    """The subjects' photos as samples to store, in their order, with masks unless `data.mask` is false.

    `meta` has the photo's file name, SHA-256 and upright size in pixels (`width`, `height`), and the class noun. An
    empty caption means that the run's template holds.
    """
    photos = ((subject, number, path) for subject in subjects for number, path in enumerate(subject.images))
    return ahead(lambda photo: _photo_sample(*photo, data), photos)


def source_digest(subjects: list[Subject], data: DataConfig) -> str:
    """SHA-256 (hex) of everything that decides what shards hold: photos, masks, ids, classes, captions, resolution,
    format."""
    digest = hashlib.sha256(json.dumps([FORMAT, VERSION, data.resolution]).encode())
    pairs = ((subject, path) for subject in subjects for path in subject.images)
    for line in ahead(lambda pair: _source_line(*pair, data), pairs):
        digest.update(line)
    return digest.hexdigest()


def _source_line(subject: Subject, path: Path, data: DataConfig) -> bytes:
    content = read_photo(path)
    line = [subject.id, subject.class_noun, subject.caption, path.name, hashlib.sha256(content).hexdigest()]
    mask = mask_source(subject, path, content, data)
    return json.dumps(line if mask is None else [*line, hashlib.sha256(mask).hexdigest()]).encode()


def _photo_sample(subject: Subject, number: int, path: Path, data: DataConfig) -> Sample:
    content = read_photo(path)
    image, mask = open_with_mask(subject, path, content, data)
    stored, extension = encode(shorten(image, data.resolution))
    stored_mask = None if mask is None else encode_grey(shorten(mask, data.resolution))
    meta = {
        "source": path.name,
        "source_sha256": hashlib.sha256(content).hexdigest(),
        "class": subject.class_noun,
        "width": image.width,
        "height": image.height,
    }
    key = make_key(subject.id, Role.INSTANCE, number)
    return Sample(key, subject.id, Role.INSTANCE, subject.caption or "", stored, extension, meta, stored_mask)


def _name_left_out(out: Path, left_out: dict[str, list[str]]) -> None:
    if left_out:
        write_file(out / SKIPPED, json.dumps(left_out, indent=1).encode())


def _repair_reason(made: Index, source: str, out: Path) -> list[str]:
    """The damage for which a folder must be remade, a line each. DataError if it was made from other input."""
    if made.source != source:
        what = f"{out}: holds shards made from other photos, captions or another resolution"
        raise DataError(f"{what}; choose another --out, or move this folder away")
    return verify(out)
