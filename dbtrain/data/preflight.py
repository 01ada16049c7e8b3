"""Everything that can be known to be wrong with subjects and photos before any other work. Reads only."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dbtrain.batch import SUBJECT_ID, Subject
from dbtrain.config import RunConfig
from dbtrain.data.ahead import ahead
from dbtrain.data.finding import Finding, named, shown
from dbtrain.data.images import open_photo
from dbtrain.data.manifest import scan_manifest
from dbtrain.errors import DataError
from dbtrain.prompts import fill

MAX_TOKENS = 75
"""Caption tokens that CLIP reads, without its start and end marks."""


def preflight(
    subjects: list[Subject], config: RunConfig, tokens: Callable[[str], int] | None = None, limit: int = MAX_TOKENS
) -> list[Finding]:
    """All defects of the subjects' fields and photos, in the subjects' order; empty means that training can begin.

    Photos are decoded in full, one after another, in flat memory. `tokens` counts a filled-in caption's tokens in the
    base model's tokenizer, of which its text encoder reads `limit`; None leaves caption lengths unchecked.
    """
    found = [*_identity(subjects), *_fields(subjects, config), *_photos(subjects)]
    return found + (list(_captions(subjects, config, tokens, limit)) if tokens else [])


def sift(
    manifest: Path, config: RunConfig, tokens: Callable[[str], int] | None = None, limit: int = MAX_TOKENS
) -> tuple[list[Subject], list[Finding]]:
    """(subjects of a manifest without a finding, all findings): what `--skip-bad` goes on with, and why."""
    subjects, findings = scan_manifest(manifest)
    findings += preflight(subjects, config, tokens, limit)
    # A row whose id is none cannot be told apart from others by it, but it is no subject either.
    bad = {finding.subject.casefold() for finding in findings}
    return [subject for subject in subjects if subject.id.casefold() not in bad], findings


def caption_tokens(tokenizer: Any) -> tuple[Callable[[str], int], int]:
    """(counter of a caption's tokens, number that the text encoder reads besides its start and end marks)."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return count, tokenizer.model_max_length - 2


def _identity(subjects: list[Subject]) -> Iterator[Finding]:
    """Ids that are unsafe as names, or that stand twice on a file system that ignores case."""
    seen: dict[str, str] = {}
    for subject in subjects:
        folded = subject.id.casefold()
        if not SUBJECT_ID.fullmatch(subject.id):
            yield Finding(
                shown(subject.id), "id", f"is {shown(subject.id)}", "use letters, digits, _ and -, at most 64"
            )
        if folded in seen:
            what = "stands twice" if seen[folded] == subject.id else f"differs only by case from {shown(seen[folded])}"
            yield Finding(subject.id, "id", what, "give each subject an id of its own")
        seen.setdefault(folded, subject.id)


def _fields(subjects: list[Subject], config: RunConfig) -> Iterator[Finding]:
    warmup = config.train.warmup_steps
    for subject in subjects:
        rules = (
            ("class", not subject.class_noun.strip(), "is empty", "name the kind of thing the subject is"),
            ("images", not subject.images, "has no photo", "give 3-5 photos of the subject"),
            (
                "steps",
                subject.steps is not None and 0 < subject.steps <= warmup,
                f"is {subject.steps}, but train.warmup_steps is {warmup}",
                "raise it, or shorten the warm-up",
            ),
        )
        yield from (Finding(subject.id, name, what, remedy) for name, wrong, what, remedy in rules if wrong)


def _captions(
    subjects: list[Subject], config: RunConfig, tokens: Callable[[str], int], limit: int
) -> Iterator[Finding]:
    for subject in subjects:
        # Identifiers are given out later, as one token where nothing else is asked for.
        identifier = subject.identifier or "sks " * config.identifier.tokens
        text = fill(subject.caption or config.data.caption, identifier=identifier, class_noun=subject.class_noun)
        if (count := tokens(text)) > limit:
            yield Finding(subject.id, "caption", f"has {count} tokens, {limit} are read", "shorten it")


def _photos(subjects: list[Subject]) -> Iterator[Finding]:
    pairs = ((subject, path) for subject in subjects for path in subject.images)
    return (finding for finding in ahead(_photo, pairs) if finding is not None)


def _photo(pair: tuple[Subject, Path]) -> Finding | None:
    subject, path = pair
    try:
        open_photo(path)
    except DataError as error:
        what, _, remedy = str(error).removeprefix(f"{path}: ").rpartition("; ")
        return Finding(subject.id, named(path), named(what), remedy)
    return None
