"""Checks of subjects and photos before any other work, against the settings and the base model. Nothing is written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from dbtrain.data.appearance import BLURRED, alike, sharpness, tiny_picture
from dbtrain.data.buckets import covering, shape_of
from dbtrain.data.color import UNREAD
from dbtrain.data.images import read_photo
from dbtrain.data.prefetch import ahead
from dbtrain.errors import DataError, named
from dbtrain.settings.config import DataConfig, RunConfig
from dbtrain.subjects.columns import COLUMNS
from dbtrain.subjects.finding import Finding, defects
from dbtrain.subjects.identifiers import remarks, same_tokens
from dbtrain.subjects.masks import astray, mask_file, open_with_mask
from dbtrain.subjects.prompts import fill
from dbtrain.subjects.registry import read_registry, taken_identifiers, vocabulary_digest
from dbtrain.values import Subject

SMALL = 0.75
"""Share of the training resolution below which a photo's short side is worth a note."""
MARKS = 2
"""Tokens of a text encoder's length that are its start and end marks."""


def preflight(
    subjects: Sequence[Subject],
    config: RunConfig,
    tokenizer: Any = None,
    registry: Path | None = None,
    photos: bool = True,
) -> list[Finding]:
    """All defects of subjects under a run's settings, and notes; without a defect, training can begin.

    Photos are decoded in full, a few at a time. photos: False does not look at them.
    tokenizer: the base model's; None leaves captions and identifiers unchecked.
    registry: holds the identifiers that were given out; None is the one in the settings, if any.
    """
    findings = [*_conflicts(subjects, config)]
    if tokenizer is not None:
        findings += [*_captions(subjects, config, tokenizer), *_identifiers(subjects, config, tokenizer, registry)]
    return [*findings, *_photos(subjects, config.data)] if photos else findings


def sift(
    subjects: Sequence[Subject],
    findings: Sequence[Finding],
    config: RunConfig,
    tokenizer: Any = None,
    registry: Path | None = None,
    photos: bool = True,
) -> tuple[list[Subject], list[Finding]]:
    """(subjects without a defect, all findings) of a manifest that `scan_manifest` has read.

    The findings are those of the reading, then those of `preflight`, whose arguments the others are. `--skip-bad` goes
    on with these subjects.
    """
    findings = [*findings, *preflight(subjects, config, tokenizer, registry, photos)]
    # A finding on a row without an id has the subject "", which is no subject's id.
    bad = {finding.subject for finding in defects(findings)}
    return [subject for subject in subjects if subject.id not in bad], findings


def _conflicts(subjects: Sequence[Subject], config: RunConfig) -> Iterator[Finding]:
    """Values of subjects that the run's settings cannot give them."""
    for subject in subjects:
        for column in COLUMNS.values():
            if (value := getattr(subject, column.field)) is not None:
                for what, remedy in column.conflicts(value, config):
                    yield Finding(subject.id, column.name, what, remedy)


def _captions(subjects: Sequence[Subject], config: RunConfig, tokenizer: Any) -> Iterator[Finding]:
    """Captions of subjects and classes that are longer than the text encoder reads."""
    limit = tokenizer.model_max_length - MARKS
    for subject in subjects:
        noun = subject.class_noun
        # Identifiers are given out later, as one token where nothing else is asked for.
        identifier = subject.identifier or "sks " * config.identifier.tokens
        texts = {"caption": fill(subject.caption or config.data.caption, identifier=identifier, class_noun=noun)}
        if (config.prior.weight if subject.prior_weight is None else subject.prior_weight) > 0:
            texts["class"] = fill(config.data.class_caption, class_noun=noun)
        own = [fill(text, identifier=identifier, class_noun=noun) for text in subject.captions or () if text]
        if own:
            longest = max(len(ids) for ids in tokenizer(own, add_special_tokens=False, verbose=False)["input_ids"])
            if longest > limit:
                what = f"has {longest} tokens in the longest of its photos' captions, {limit} are read"
                yield Finding(subject.id, "captions", what, "the rest of it has no effect; shorten it", note=True)
        for place, text in texts.items():
            count = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if count > limit:
                what = "has" if place == "caption" else "makes a caption of"
                yield Finding(subject.id, place, f"{what} {count} tokens, {limit} are read", "shorten it")


def _identifiers(
    subjects: Sequence[Subject], config: RunConfig, tokenizer: Any, registry: Path | None
) -> Iterator[Finding]:
    """Notes on identifiers that a user chose and that are not good, and those that were given to another subject."""
    asked = [subject.identifier for subject in subjects if subject.identifier]
    reasons = remarks(tokenizer, asked)
    doubles = {later: first for first, later in same_tokens(tokenizer, asked)}
    for subject in subjects:
        name = subject.identifier
        if name in reasons:
            remedy = "it is used as it is; `dbtrain identifiers` lists rarer ones"
            yield Finding(subject.id, "identifier", reasons[name], remedy, note=True)
        if name in doubles:
            what = f"{name!r} is read as the same tokens as {doubles[name]!r} of another subject"
            yield Finding(subject.id, "identifier", what, "choose another, unless they share it on purpose", note=True)
    registry = registry or (Path(config.identifier.registry) if config.identifier.registry else None)
    if registry is not None:
        yield from taken_identifiers(registry, subjects, read_registry(registry, vocabulary_digest(tokenizer)))


def _photos(subjects: Sequence[Subject], data: DataConfig) -> Iterator[Finding]:
    """Photos and masks that cannot be used, and for each subject what is to say about the others."""
    if data.mask is not False:
        yield from (finding for subject in subjects for finding in astray(subject))
    pairs = ((subject, path) for subject in subjects for path in subject.images)
    looks = ahead(lambda pair: _look(*pair, data), pairs)
    for subject in subjects:
        seen = [(path, next(looks)) for path in subject.images]
        for path, look in seen:
            if look.problem is not None:
                # The photo is at fault, or else its mask.
                mask = mask_file(subject, path)
                place = mask if mask is not None and look.problem.startswith(f"{mask}: ") else path
                what, _, remedy = look.problem.removeprefix(f"{place}: ").rpartition("; ")
                yield Finding(subject.id, named(place), named(what), remedy)
        yield from _remarks(subject.id, seen, data.resolution)


@dataclass(frozen=True)
class Look:
    """What preflight sees in a photo. problem: why it or its mask cannot be used, or None; nothing else holds then.
    short_side: in pixels. enlarged: how many times its sides grow in training. unread: whether its colour profile could
    not be used. sharpness, tiny: see `appearance.py`."""

    problem: str | None = None
    short_side: int = 0
    enlarged: float = 0.0
    unread: bool = False
    sharpness: float | None = None
    tiny: np.ndarray | None = None


def _look(subject: Subject, path: Path, data: DataConfig) -> Look:
    try:
        image, _ = open_with_mask(subject, path, read_photo(path), data)
    except DataError as error:
        return Look(problem=str(error))
    enlarged = min(covering(image.size, shape_of(image.size, data))) / min(image.size)
    sharp = sharpness(image, data.resolution)
    return Look(None, min(image.size), enlarged, UNREAD in image.info, sharp, tiny_picture(image))


def _remarks(name: str, seen: Sequence[tuple[Path, Look]], resolution: int) -> Iterator[Finding]:
    """Notes on the sound photos of a subject: one for each thing to say, about the photo that shows it most."""
    sound = [(path, look) for path, look in seen if look.problem is None]

    def note(places: Sequence[Path], what: str, others: str, remedy: str) -> Finding:
        more = f" ({others.format(len(places) - 1)})" if len(places) > 1 else ""
        return Finding(name, named(places[0]), what + more, remedy, note=True)

    small = sorted((look.short_side, path) for path, look in sound if look.enlarged * SMALL > 1)
    if small:
        remedy = f"enlarged to data.resolution={resolution}, it is blurred; use larger photos, or a lower resolution"
        places = [path for _, path in small]
        yield note(places, f"short side of {small[0][0]} px", "and {} more are too small", remedy)
    unread = [path for path, look in sound if look.unread]
    if unread:
        what = "its colour profile cannot be used"
        yield note(unread, what, "nor that of {} more", "its values are taken as sRGB")
    blurred = sorted((sharp, path) for path, look in sound if (sharp := look.sharpness) is not None and sharp < BLURRED)
    if blurred:
        what, remedy = "looks blurred", "what is trained on it is blurred too; use a sharp one, unless this is meant"
        yield note([path for _, path in blurred], what, "and {} more", remedy)
    twins = sorted(alike([look.tiny for _, look in sound if look.tiny is not None]), key=itemgetter(2), reverse=True)
    if twins:
        one, two = (sound[number][0] for number in twins[0][:2])
        what, remedy = f"looks the same as {named(two)}", "together they have the weight of two; keep one of them"
        yield note([one] * len(twins), what, "and {} more pairs do", remedy)
