"""Which identifier was given to which subject, written down: so that none changes when subjects come later.

A registry is `identifiers.jsonl`: a header line that names the vocabulary, a line a subject, and a last line with the
SHA-256 of all lines before it. Runs that share one (`identifier.registry`) never give two subjects the same identifier;
within them, a subject's id means the same subject everywhere.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbtrain.atomic import held, sweep, write_file
from dbtrain.batch import Subject
from dbtrain.errors import ConfigError, DataError
from dbtrain.identifiers import allocate

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
            _refuse_taken(registry, subjects, known)
            known |= allocate(tokenizer, subjects, tokens, seed, known)
            sweep(registry.parent, registry.name)
            write_file(registry, _to_bytes(vocabulary, known))
    return {subject.id: known[subject.id] for subject in subjects}


def read_registry(registry: Path, vocabulary: str) -> dict[str, str]:
    """The recorded identifiers by subject id; empty if there is no registry yet."""
    if not registry.exists():
        return {}
    content = registry.read_bytes()
    cut = content.rfind(b"\n", 0, -1) + 1
    if content[cut:] != _closing(content[:cut]):
        raise DataError(f"{registry}: is damaged (its digest differs); put a copy back, or use another registry")
    header, *lines = map(json.loads, content[:cut].splitlines())
    if header != {"format": FORMAT, "version": 1, "vocabulary": vocabulary}:
        raise ConfigError(f"{registry}: was made for a model with another vocabulary; give each vocabulary its own")
    return dict(lines)


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _is_new(subject: Subject, known: dict[str, str]) -> bool:
    return known.get(subject.id) is None or subject.identifier not in (None, known[subject.id])


def _refuse_taken(registry: Path, subjects: Sequence[Subject], known: dict[str, str]) -> None:
    """An identifier that a manifest asks for must not have been given to a subject outside this manifest."""
    own = {subject.id for subject in subjects}
    owners = {name.casefold(): subject for subject, name in known.items() if subject not in own}
    findings = [
        f"{registry}: {subject.identifier!r}, asked for by subject {subject.id}, was given to subject "
        f"{owners[subject.identifier.casefold()]}; choose another identifier, or leave it empty"
        for subject in subjects
        if subject.identifier and subject.identifier.casefold() in owners
    ]
    if findings:
        raise ConfigError(findings)


def _to_bytes(vocabulary: str, known: dict[str, str]) -> bytes:
    lines = [{"format": FORMAT, "version": 1, "vocabulary": vocabulary}, *map(list, known.items())]
    body = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    return body + _closing(body)


def _closing(body: bytes) -> bytes:
    return f'{{"sha256":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()
