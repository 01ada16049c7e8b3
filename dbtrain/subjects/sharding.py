"""Photos of subjects as shards: written once, checked on later runs; and which subjects are left out, with reasons."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbtrain.data.images import encode, encode_grey, read_photo, shorten
from dbtrain.data.index import FORMAT, INDEX_NAME, VERSION, Index, make_key
from dbtrain.data.prefetch import ahead
from dbtrain.data.shards import MARK, grow_shards, tidy, write_shards
from dbtrain.data.stream import SKIPPED, verify
from dbtrain.errors import DataError
from dbtrain.settings.config import DataConfig, RunConfig
from dbtrain.settings.stages import largest_side
from dbtrain.storage.atomic import write_file
from dbtrain.subjects.finding import Finding, defects, notes, refuse
from dbtrain.subjects.growing import MASK, growth, summary
from dbtrain.subjects.masks import mask_source, open_with_mask
from dbtrain.subjects.preflight import sift
from dbtrain.values import OWN, Role, Sample, Subject


@dataclass(frozen=True)
class SourceLine:
    """What decides a stored photo. photo, mask: SHA-256 (hex) of their files' content. own: its own caption.

    `mask` and `own` are empty where the photo has none.
    """

    subject: str
    noun: str
    caption: str | None
    file: str
    photo: str
    own: str = ""
    mask: str = ""

    def words(self) -> list[Any]:
        """What is digested. A mask is named, since a caption could be a digest's text."""
        words = [self.subject, self.noun, self.caption, self.file, self.photo]
        return words + ([self.own] if self.own else []) + ([{"mask": self.mask}] if self.mask else [])


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
    """The index of the shards that hold the subjects' photos at `data.resolution`, that of the largest stage.

    `subjects` and `findings` are what `scan_manifest` read. A second call with the same input changes nothing, or
    remakes what is damaged, and says so. With more subjects or photos it adds these. Photos that are in the shards
    already are not decoded again. `tokenizer` and `registry` are those of `preflight`.

    Raises one DataError with all findings, those of `preflight` included, before anything is written. With `skip_bad`,
    subjects with findings are left out instead: `say` gets a line for each, and `skipped.json` the reasons. Raises
    DataError too where `out` was made from other input: other captions or classes, photos that are gone.
    """
    out = Path(out)
    config = config.replaced("data.resolution", largest_side(config))
    ready = config.data.shards is not None
    made = Index.load(out) if not ready and (out / INDEX_NAME).exists() and not (out / MARK).exists() else None
    photos = not ready and (made is None or skip_bad)
    subjects, findings = sift(subjects, findings, config, tokenizer, registry, photos)
    for note in notes(findings):
        say(f"note: {note.line()}")
    findings = defects(findings)
    if ready:
        return _ready_made(config.data, subjects, findings, out, skip_bad, say)
    left_out = _left_out(findings, skip_bad and bool(subjects), say)
    lines = source_lines(subjects, config.data)
    source = source_digest(lines, config.data)
    if made is not None:
        tidy(out, made)
        damage = verify(out)
        if damage and made.source != source:
            what = f"{out}: is damaged, and the manifest or photos have changed; move it away, and run again"
            raise DataError("\n".join([*damage, what]))
        if not damage:
            if made.source != source:
                made = _grow(subjects, lines, made, out, config, source, say)
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
    """The subjects' photos as samples to store, in their order, as a run's settings want them: with masks unless
    `data.mask` is false.

    `meta` has the photo's file name, SHA-256 and upright size in pixels (`width`, `height`), and the class noun. An
    empty caption means that the run's template holds. `meta[OWN]` is True where the caption is the photo's own.
    `meta[MASK]` is the SHA-256 of the mask's file, where there is one.
    """
    photos = ((subject, number) for subject in subjects for number in range(len(subject.images)))
    return ahead(lambda photo: _photo_sample(*photo, data), photos)


def source_digest(lines: Sequence[SourceLine], data: DataConfig) -> str:
    """SHA-256 (hex) of everything that decides what shards hold: photos, masks, ids, classes, captions, resolution,
    format."""
    about = [FORMAT, VERSION, data.resolution, *([] if data.srgb else ["srgb=false"])]
    digest = hashlib.sha256(json.dumps(about).encode())
    for line in lines:
        digest.update(json.dumps(line.words()).encode())
    return digest.hexdigest()


def source_lines(subjects: Sequence[Subject], data: DataConfig) -> list[SourceLine]:
    """What decides the stored photos of subjects: a line for each, in order."""
    pairs = ((subject, number) for subject in subjects for number in range(len(subject.images)))
    return list(ahead(lambda pair: _source_line(*pair, data), pairs))


def _source_line(subject: Subject, number: int, data: DataConfig) -> SourceLine:
    path, own = subject.images[number], _own_caption(subject, number)
    content = read_photo(path)
    photo, mask = hashlib.sha256(content).hexdigest(), _mask_digest(subject, path, content, data)
    return SourceLine(subject.id, subject.class_noun, subject.caption, path.name, photo, own, mask)


def _mask_digest(subject: Subject, path: Path, content: bytes, data: DataConfig) -> str:
    """SHA-256 (hex) of what a photo's mask comes from; empty where it has none."""
    source = mask_source(subject, path, content, data)
    return "" if source is None else hashlib.sha256(source).hexdigest()


def _grow(
    subjects: Sequence[Subject],
    lines: Sequence[SourceLine],
    made: Index,
    out: Path,
    config: RunConfig,
    source: str,
    say: Callable[[str], None],
) -> Index:
    """The index of a sound folder after it took in what has joined. Raises DataError for other changes, and for photos
    that cannot be read, before anything is written."""
    wanted = [(line.subject, (line.photo, line.own or line.caption or "", line.noun, line.mask)) for line in lines]
    found = growth(subjects, wanted, made, out, config.data.resolution)
    joining = [*found.new, *found.grown]
    refuse(defects(sift(joining, [], config)[1]))
    for line in summary(found, out):
        say(line)
    replaced = {subject.id for subject in found.grown}
    return grow_shards(photo_samples(joining, config.data), out, made, replaced, source)


def _own_caption(subject: Subject, number: int) -> str:
    """The caption of a subject's photo; empty where it has none of its own."""
    return subject.captions[number] if subject.captions else ""


def _photo_sample(subject: Subject, number: int, data: DataConfig) -> Sample:
    path, own = subject.images[number], _own_caption(subject, number)
    content = read_photo(path)
    image, mask = open_with_mask(subject, path, content, data)
    mask_digest = _mask_digest(subject, path, content, data)
    stored, extension = encode(shorten(image, data.resolution))
    stored_mask = None if mask is None else encode_grey(shorten(mask, data.resolution))
    meta = {
        "source": path.name,
        "source_sha256": hashlib.sha256(content).hexdigest(),
        "class": subject.class_noun,
        "width": image.width,
        "height": image.height,
        **({OWN: True} if own else {}),
        **({MASK: mask_digest} if mask_digest else {}),
    }
    key = make_key(subject.id, Role.INSTANCE, number)
    return Sample(key, subject.id, Role.INSTANCE, own or subject.caption or "", stored, extension, meta, stored_mask)


def _name_left_out(out: Path, left_out: dict[str, list[str]]) -> None:
    if left_out:
        write_file(out / SKIPPED, json.dumps(left_out, indent=1).encode())
