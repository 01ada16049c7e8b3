"""Which identifier was given to which subject, written down: so that none changes when subjects come later.

A registry is `identifiers.jsonl`, sealed lines (`sealed.py`): a header that names the vocabulary, and a line a subject.
Runs that share one (`identifier.registry`) never give two subjects the same identifier;
within them, a subject's id means the same subject everywhere.
"""

import hashlib
import json
from collections.abc import Sequence
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
    """An identifier for each subject id: the recorded one, or one that nobody has, recorded before it is given out.

    Raises DataError for a damaged registry, ConfigError for one of another vocabulary, or where a manifest asks for an
    identifier that was given to another subject.
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


def read_registry(registry: Path, vocabulary: str) -> dict[str, str]:
    """The recorded identifiers by subject id; empty if there is no registry yet."""
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
    """A finding for each subject that asks for an identifier which was given to another, here or in another manifest.

    Subjects that ask for one identifier by name share it on purpose.
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
        if wanted != known.get(name) and wanted.casefold() in owners
    ]
