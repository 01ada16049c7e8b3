"""The index of a shard folder: what lies where, with a digest for all of it; and the order in which it is drawn.

`index.jsonl` is sealed lines (`sealed.py`): a header, then a line for each sample in storage order. A line is a list
under the header's `columns`, which keeps a million samples near 200 MB. Only a folder that holds masks has the column
`masked`.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dbtrain.data.location import place_of
from dbtrain.errors import DataError, shown
from dbtrain.storage.atomic import write_file
from dbtrain.storage.sealed import seal, unseal
from dbtrain.values import SUBJECT_ID, Role

INDEX_NAME = "index.jsonl"
FORMAT = "dbtrain-shards"
VERSION = 1
COLUMNS = ["shard", "key", "offset", "length", "sha256", "caption"]
MASKED = [*COLUMNS, "masked"]
"""The columns of a folder with masks."""
SHARD_NAME = re.compile(r"train-[0-9]{6}\.tar")
KEY = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63})-([01])-(0|[1-9][0-9]{0,8})")
DIGEST = re.compile(r"[0-9a-f]{64}")
TAR_END = 1024
"""Bytes of the two zero blocks that close a tar file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one sample lies: bytes [offset, offset + length) of a shard, whose SHA-256 is `sha256` (hex).

    masked: whether a mask lies beside the image.
    """

    shard: str
    key: str
    offset: int
    length: int
    sha256: str
    caption: str
    masked: bool = False

    @property
    def subject(self) -> str:
        """The id of the sample's subject."""
        return split_key(self.key)[0]

    @property
    def role(self) -> Role:
        """The role of the sample."""
        return split_key(self.key)[1]


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file of a folder: its name, SHA-256 (hex), size in bytes and number of samples."""

    name: str
    sha256: str
    size: int
    count: int


@dataclass(frozen=True)
class Index:
    """All samples of a shard folder in storage order, its shards, and the digest of the input it was made from."""

    entries: tuple[Entry, ...]
    shards: tuple[Shard, ...]
    source: str = ""

    @classmethod
    def load(cls, directory: Path | str, schemes: Collection[str] = ()) -> "Index":
        """The verified index of a folder; DataError if it is missing, damaged, or at odds with itself."""
        path = f"{directory}/{INDEX_NAME}"
        try:
            with place_of(directory, schemes).open(INDEX_NAME) as file:
                content = file.read()
        except OSError as error:
            what = f"{path}: cannot be read ({error.strerror or error})"
            remedy = f"make the folder with `dbtrain shard MANIFEST --out {directory} --config RECIPE`"
            raise DataError(f"{what}; {remedy}") from error
        try:
            index = _parse(content)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            what = f"{path}: is damaged ({shown(str(error))})"
            raise DataError(f"{what}; move the folder away and run `dbtrain shard` again") from error
        return index

    def save(self, directory: Path) -> None:
        """Write the index into the folder, whole or not at all."""
        write_file(Path(directory) / INDEX_NAME, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the index file; equal indexes have equal bytes."""
        numbers = {shard.name: number for number, shard in enumerate(self.shards)}
        shards = [[shard.name, shard.sha256, shard.size, shard.count] for shard in self.shards]
        header = {
            "format": FORMAT,
            "version": VERSION,
            "samples": len(self.entries),
            "source": self.source,
            "columns": MASKED if self.masked else COLUMNS,
            "shards": shards,
        }
        entries = ([numbers[r.shard], r.key, r.offset, r.length, r.sha256, r.caption] for r in self.entries)
        if self.masked:
            entries = ([*line, entry.masked] for line, entry in zip(entries, self.entries))
        return seal([header, *entries])

    @cached_property
    def masked(self) -> bool:
        """Whether any sample has a mask."""
        return any(entry.masked for entry in self.entries)

    def entries_of(self, subject: str, role: Role = Role.INSTANCE) -> tuple[Entry, ...]:
        """A subject's samples of a role in storage order; empty if it has none."""
        return self._by_subject.get((subject, role), ())

    @cached_property
    def subjects(self) -> tuple[str, ...]:
        """The ids in the index, in storage order."""
        return tuple(dict.fromkeys(subject for subject, _ in self._by_subject))

    @cached_property
    def _by_subject(self) -> dict[tuple[str, Role], tuple[Entry, ...]]:
        groups: dict[tuple[str, Role], list[Entry]] = {}
        for entry in self.entries:
            subject, role, _ = split_key(entry.key)
            groups.setdefault((subject, role), []).append(entry)
        return {group: tuple(entries) for group, entries in groups.items()}


def order(count: int, start: int, n: int, seed: int, subject: str, role: Role = Role.INSTANCE) -> list[int]:
    """The sample (0..count-1) that each of the draws start..start+n-1 of a subject uses.

    Draw p belongs to epoch p // count, and an epoch is one keyed permutation: every sample exactly once. It depends on
    nothing but its arguments, so that resuming and ranks need no state.
    """
    from dbtrain.randomness import permutation  # loads torch, which a driver does without

    if count < 1:
        raise DataError(f"subject {subject}: has no {role.name.lower()} samples to draw from")
    epochs = {
        epoch: permutation(seed, subject, int(role), epoch, count)
        for epoch in range(start // count, (start + n - 1) // count + 1)
    }
    return [epochs[p // count][p % count] for p in range(start, start + n)]


def make_key(subject: str, role: Role, number: int) -> str:
    """The key of a subject's number-th sample of a role: safe as a file name, and without dots."""
    return f"{subject}-{int(role)}-{number}"


def split_key(key: str) -> tuple[str, Role, int]:
    """(subject, role, number) of a sample's key; ValueError if it is none."""
    match = KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key!r} is no sample key")
    return match[1], Role(int(match[2])), int(match[3])


def _parse(content: bytes) -> Index:
    """The index in a file's bytes; ValueError, TypeError or LookupError says what is wrong."""
    header, *lines = unseal(content)
    if header["format"] != FORMAT or header["version"] != VERSION or header["columns"] not in (COLUMNS, MASKED):
        raise ValueError(f"format {header['format']} {header['version']}, want {FORMAT} {VERSION}")
    shards = tuple(Shard(*shard) for shard in header["shards"])
    entries = tuple(Entry(shards[line[0]].name, *line[1:]) for line in lines)
    if len(entries) != header["samples"]:
        raise ValueError(f"{len(entries)} entries for {header['samples']} samples")
    _check(entries, shards)
    return Index(entries, shards, header["source"])


def _check(entries: tuple[Entry, ...], shards: tuple[Shard, ...]) -> None:
    """Raise ValueError if names are unsafe, keys repeat, or the entries do not fill the shards without gaps."""
    numbers = [number for entry in entries for number in (entry.offset, entry.length)]
    numbers += [number for shard in shards for number in (shard.size, shard.count)]
    if not all(type(number) is int for number in numbers):
        raise ValueError("a size or an offset is no whole number")
    if not all(type(entry.masked) is bool for entry in entries):
        raise ValueError("a column `masked` is neither true nor false")
    if len({entry.key for entry in entries}) < len(entries):
        raise ValueError("a key stands twice")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError("a shard stands twice")
    left = iter(entries)
    for shard in shards:
        if not SHARD_NAME.fullmatch(shard.name) or not DIGEST.fullmatch(shard.sha256):
            raise ValueError(f"shard {shown(shard.name)} has an unsafe name or no digest")
        end = _fill(shard, left)
        if end + TAR_END != shard.size:
            raise ValueError(f"shard {shard.name} has {shard.size} bytes for {end} in samples")
    if next(left, None) is not None:
        raise ValueError("more entries than the shards hold")


def _fill(shard: Shard, entries: Iterator[Entry]) -> int:
    """The end of the last of the next `shard.count` entries, which must follow each other from the shard's start."""
    end = 0
    for _ in range(shard.count):
        entry = next(entries, None)
        if entry is None or entry.shard != shard.name or entry.offset != end or entry.length <= 0 or entry.length % 512:
            raise ValueError(f"entries of shard {shard.name} leave a gap or overlap after byte {end}")
        if not SUBJECT_ID.fullmatch(split_key(entry.key)[0]) or not DIGEST.fullmatch(entry.sha256):
            raise ValueError(f"entry {shown(entry.key)} has an unsafe name or no digest")
        end += entry.length
    return end
