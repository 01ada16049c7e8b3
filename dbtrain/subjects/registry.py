"""The record of each subject's identifier, so that no identifier changes when other subjects come later.

A registry is `identifiers.jsonl`, sealed lines (`storage/sealed.py`): a header that names the vocabulary, then a line
for each subject. Runs that share a registry (`identifier.registry`) never give two subjects the same identifier; an id
means the same subject in all of them.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from dbtrain.errors import ConfigError, DataError
from dbtrain.storage.atomic import held, sweep, write_file
from dbtrain.storage.sealed import seal, unseal
from dbtrain.subjects.finding import Finding
from dbtrain.subjects.identifiers import allocate
from dbtrain.values import Subject

REGISTRY = "identifiers.jsonl"
FORMAT = "dbtrain-identifiers"


def recorded_identifiers(
    registry: Path, tokenizer: Any, subjects: Sequence[Subject], tokens: int = 1, seed: int = 0
) -> dict[str, str]:
    """An identifier for each subject id: the recorded one, or a new one, which is recorded before this returns.

    Raises DataError for a damaged registry. Raises ConfigError for a registry of another vocabulary, and where a
    subject asks for an identifier that was given to another subject.
    """
    vocabulary = vocabulary_digest(tokenizer)
    known = read_registry(registry, vocabulary)
    if any(_is_new(subject, known) for subject in subjects):
        with held(registry.with_name(f".{registry.name}.lock"), wait=True):
            known = read_registry(registry, vocabulary)
            if findings := taken_identifiers(registry, subjects, known):
                raise ConfigError([finding.line() for finding in findings])
            known |= allocate(tokenizer, subjects, tokens, seed, known)
            sweep(registry.parent, registry.name)
            header = {"format": FORMAT, "version": 1, "vocabulary": vocabulary}
            write_file(registry, seal([header, *map(list, known.items())]))
    return {subject.id: known[subject.id] for subject in subjects}


def forget_identifiers(registry: Path, subjects: Collection[str]) -> int:
    """How many subjects' lines were taken out of a registry. Their identifiers may be given out again."""
    if not registry.exists():
        return 0
    with held(registry.with_name(f".{registry.name}.lock"), wait=True):
        header, *lines = unseal(registry.read_bytes())
        left = [line for line in lines if line[0] not in subjects]
        if len(left) < len(lines):
            write_file(registry, seal([header, *left]))
    return len(lines) - len(left)


def read_registry(registry: Path, vocabulary: str) -> dict[str, str]:
    """The recorded identifiers by subject id; empty if there is no registry yet. DataError and ConfigError as above."""
    if not registry.exists():
        return {}
    try:
        header, *lines = unseal(registry.read_bytes())
    except ValueError as error:
        raise DataError(f"{registry}: is damaged ({error}); put a copy back, or use another registry") from error
    if header != {"format": FORMAT, "version": 1, "vocabulary": vocabulary}:
        raise ConfigError(f"{registry}: was made for a model with another vocabulary; give each vocabulary its own")
    return dict(lines)


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _is_new(subject: Subject, known: dict[str, str]) -> bool:
    return known.get(subject.id) is None or subject.identifier not in (None, known[subject.id])


def taken_identifiers(registry: Path, subjects: Sequence[Subject], known: dict[str, str]) -> list[Finding]:
    """A finding for each subject that asks for an identifier of another subject, of this manifest or an earlier one.

    Subjects that ask for the same identifier by name share it on purpose.
    """
    asking = {subject.id: subject.identifier for subject in subjects if subject.identifier}
    owners = {name.casefold(): owner for owner, name in known.items() if owner not in asking}
    return [
        Finding(
            name,
            str(registry),
            f"identifier {wanted!r} was given to subject {owners[wanted.casefold()]}",
            "choose another identifier, or leave it empty",
        )
        for name, wanted in asking.items()
        if wanted.casefold() != known.get(name, "").casefold() and wanted.casefold() in owners
    ]
