"""Everything that can be known to be wrong with subjects and photos before any other work. Reads only."""

from collections.abc import Callable, Iterator
from pathlib import Path

from dbtrain.batch import SUBJECT_ID, Subject
from dbtrain.config import RunConfig
from dbtrain.data.ahead import ahead
from dbtrain.data.finding import Finding, shown
from dbtrain.data.images import open_photo
from dbtrain.errors import DataError

MAX_TOKENS = 75
"""Caption tokens that CLIP reads, without its start and end marks."""


def preflight(subjects: list[Subject], config: RunConfig, tokens: Callable[[str], int] | None = None) -> list[Finding]:
    """All defects of the subjects' fields and photos, in the subjects' order; empty means that training can begin.

    Photos are decoded in full, one after another, in flat memory. `tokens` counts a filled-in caption's tokens in the
    base model's tokenizer; None leaves caption lengths unchecked.
    """
    return [*_identity(subjects), *_fields(subjects, config), *_captions(subjects, config, tokens), *_photos(subjects)]


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


def _captions(subjects: list[Subject], config: RunConfig, tokens: Callable[[str], int] | None) -> Iterator[Finding]:
    if not tokens:
        return
    for subject in subjects:
        names = {"identifier": subject.identifier or "", "class": subject.class_noun}
        count = tokens((subject.caption or config.data.caption).format_map(names))
        if count > MAX_TOKENS:
            yield Finding(subject.id, "caption", f"has {count} tokens, {MAX_TOKENS} are read", "shorten it")


def _photos(subjects: list[Subject]) -> Iterator[Finding]:
    pairs = ((subject, path) for subject in subjects for path in subject.images)
    return (finding for finding in ahead(_photo, pairs) if finding is not None)


def _photo(pair: tuple[Subject, Path]) -> Finding | None:
    subject, path = pair
    try:
        open_photo(path)
    except DataError as error:
        what, _, remedy = str(error).removeprefix(f"{path}: ").rpartition("; ")
        return Finding(subject.id, str(path), what, remedy)
    return None
