"""Checks of subjects and photos before any other work, against the settings and the base model. Nothing is written."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dbtrain.data.images import read_photo
from dbtrain.data.prefetch import ahead
from dbtrain.errors import DataError, named
from dbtrain.settings.config import RunConfig
from dbtrain.subjects.columns import COLUMNS
from dbtrain.subjects.finding import Finding
from dbtrain.subjects.identifiers import meanings
from dbtrain.subjects.masks import astray, mask_file, open_with_mask
from dbtrain.subjects.prompts import fill
from dbtrain.subjects.registry import read_registry, taken_identifiers, vocabulary_digest
from dbtrain.values import Subject

MARKS = 2
"""Tokens of a text encoder's length that are its start and end marks."""


def preflight(
    subjects: Sequence[Subject],
    config: RunConfig,
    tokenizer: Any = None,
    registry: Path | None = None,
    photos: bool = True,
) -> list[Finding]:
    """All defects of subjects under a run's settings; empty means that training can begin.

    Photos are decoded in full, a few at a time. photos: False does not look at them.
    tokenizer: the base model's; None leaves captions and identifiers unchecked.
    registry: holds the identifiers that were given out; None is the one in the settings, if any.
    """
    findings = [*_conflicts(subjects, config)]
    if tokenizer is not None:
        findings += [*_captions(subjects, config, tokenizer), *_identifiers(subjects, config, tokenizer, registry)]
    return [*findings, *_photos(subjects, config)] if photos else findings


def sift(
    subjects: Sequence[Subject],
    findings: Sequence[Finding],
    config: RunConfig,
    tokenizer: Any = None,
    registry: Path | None = None,
    photos: bool = True,
) -> tuple[list[Subject], list[Finding]]:
    """(subjects without a finding, all findings) of a manifest that `scan_manifest` has read.

    The findings are those of the reading, then those of `preflight`, whose arguments the others are. `--skip-bad` goes
    on with these subjects.
    """
    findings = [*findings, *preflight(subjects, config, tokenizer, registry, photos)]
    # A finding on a row without an id has the subject "", which is no subject's id.
    bad = {finding.subject for finding in findings}
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
        for place, text in texts.items():
            count = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if count > limit:
                what = "has" if place == "caption" else "makes a caption of"
                yield Finding(subject.id, place, f"{what} {count} tokens, {limit} are read", "shorten it")


def _identifiers(
    subjects: Sequence[Subject], config: RunConfig, tokenizer: Any, registry: Path | None
) -> Iterator[Finding]:
    """Identifiers that have a meaning of their own, or that were given to another subject."""
    reasons = meanings(tokenizer, (subject.identifier for subject in subjects if subject.identifier))
    for subject in subjects:
        if subject.identifier in reasons:
            what = f"{reasons[subject.identifier]}; the model would mix it with the subject"
            yield Finding(subject.id, "identifier", what, "see `dbtrain identifiers`, or leave it empty")
    registry = registry or (Path(config.identifier.registry) if config.identifier.registry else None)
    if registry is not None:
        yield from taken_identifiers(registry, subjects, read_registry(registry, vocabulary_digest(tokenizer)))


def _photos(subjects: Sequence[Subject], config: RunConfig) -> Iterator[Finding]:
    if config.data.mask is not False:
        yield from (finding for subject in subjects for finding in astray(subject))
    pairs = ((subject, path) for subject in subjects for path in subject.images)
    yield from (finding for finding in ahead(lambda pair: _photo(*pair, config), pairs) if finding is not None)


def _photo(subject: Subject, path: Path, config: RunConfig) -> Finding | None:
    try:
        open_with_mask(subject, path, read_photo(path), config.data)
    except DataError as error:
        # The photo is at fault, or else its mask.
        mask = mask_file(subject, path)
        place = mask if mask is not None and str(error).startswith(f"{mask}: ") else path
        what, _, remedy = str(error).removeprefix(f"{place}: ").rpartition("; ")
        return Finding(subject.id, named(place), named(what), remedy)
    return None
