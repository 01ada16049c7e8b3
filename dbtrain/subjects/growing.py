"""Shards that grow with their manifest: rows join, and photos join subjects; nothing is sharded twice.

What is stored is compared with the manifest subject by subject, by the digests of the photos' files. A new subject is
appended. A subject with new photos is stored anew, in the order of its photos. A subject whose row is gone keeps its
samples. Anything else is another input, and is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dbtrain.data.images import picture_size
from dbtrain.data.index import Index
from dbtrain.data.stream import read_samples
from dbtrain.errors import DataError, named, shown
from dbtrain.values import Sample, Subject

Line = tuple[str, str, str]
"""What decides a stored photo, but for the resolution: SHA-256 of its file, caption, class noun."""
REMEDY = "put its row and photos back, give it another id, or choose another --out"


@dataclass
class Growth:
    """How a manifest differs from what is stored, by ids. gone: subjects without a row."""

    new: list[Subject] = field(default_factory=list)
    grown: list[Subject] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)


def growth(
    subjects: Sequence[Subject], lines: Sequence[tuple[str, Line]], made: Index, out: Path, resolution: int
) -> Growth:
    """How the subjects of a manifest differ from what a sound folder holds. lines: (id, line) of each of their photos.

    Raises a DataError that names every subject that lost or changed something, or the other resolution.
    """
    stored: dict[str, list[Line]] = {}
    for sample in read_samples(out, made.entries):
        _refuse_resolution(sample, resolution, out)
        stored.setdefault(sample.subject, []).append(stored_line(sample))
    wanted: dict[str, list[Line]] = {}
    for subject, line in lines:
        wanted.setdefault(subject, []).append(line)
    found, refused = Growth(gone=[name for name in stored if name not in wanted]), []
    for each in subjects:
        if each.id not in stored:
            found.new.append(each)
        elif lost := Counter(stored[each.id]) - Counter(wanted[each.id]):
            refused.append(f"{out}: {each.id}: {_what_changed(lost, wanted[each.id])}; {REMEDY}")
        elif len(wanted[each.id]) > len(stored[each.id]):
            found.grown.append(each)
    if refused:
        raise DataError("\n".join(refused))
    return found


def stored_line(sample: Sample) -> Line:
    """What decided a stored sample."""
    return str(sample.meta.get("source_sha256")), sample.caption, str(sample.meta.get("class"))


def _refuse_resolution(sample: Sample, resolution: int, out: Path) -> None:
    stored = min(picture_size(sample.image))
    had = min(sample.meta.get("width", stored), sample.meta.get("height", stored))
    if stored != min(had, resolution):
        raise DataError(
            f"{out}: holds shards made from other photos, captions or another resolution ({sample.key} is stored at "
            f"{stored} px, data.resolution is {resolution}); choose another --out, or move this folder away"
        )


def _what_changed(lost: Counter[Line], wanted: Sequence[Line]) -> str:
    """What a subject lost: a photo, or the caption or class of one that is still there."""
    (digest, caption, noun), *_ = lost
    now = next((line for line in wanted if line[0] == digest), None)
    if now is None:
        return f"{sum(lost.values())} of its stored photos are gone or changed (sha256 {digest[:12]})"
    name, was, is_now = ("caption", caption, now[1]) if caption != now[1] else ("class", noun, now[2])
    return f"{name} was {shown(was)}, is {shown(is_now)}" if was != is_now else "a photo stands in it less often"


def summary(found: Growth, out: Path) -> list[str]:
    """What a person is told of a growth, a line each."""
    told = []
    if found.new:
        told.append(f"{out}: {len(found.new)} subjects join")
    if found.grown:
        told.append(f"{out}: photos join {_some([subject.id for subject in found.grown])}")
    if found.gone:
        told.append(f"{out}: {_some(found.gone)} have no row any more; what is there of them is left alone")
    return told


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(named(name) for name in names[:most]) + more
