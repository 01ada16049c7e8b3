"""The index of a shard folder: what lies where, with a digest for all of it; and the order in which it is drawn.

`index.jsonl` is sealed lines (`sealed.py`): a header, and one line a sample in storage order. A row is a list under the
header's `columns`, which keeps a million samples near 200 MB.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dbtrain.data.location import place_of
from dbtrain.errors import DataError, shown
from dbtrain.randomness import permutation
from dbtrain.storage.atomic import write_file
from dbtrain.storage.sealed import seal, unseal
from dbtrain.values import SUBJECT_ID, Role

INDEX_NAME = "index.jsonl"
FORMAT = "dbtrain-shards"
VERSION = 1
COLUMNS = ["shard", "key", "offset", "length", "sha256", "caption"]
SHARD_NAME = re.compile(r"train-[0-9]{6}\.tar")
KEY = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63})-([01])-(0|[1-9][0-9]{0,8})")
DIGEST = re.compile(r"[0-9a-f]{64}")
TAR_END = 1024
"""Bytes of the two zero blocks that close a tar file."""


@dataclass(frozen=True, slots=True)
class Row:
    """Where one sample lies: bytes [offset, offset + length) of a shard, whose SHA-256 is `sha256` (hex)."""

    shard: str
    key: str
    offset: int
    length: int
    sha256: str
    caption: str

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

    rows: tuple[Row, ...]
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
        """Nothing; afterwards the folder holds this index, whole."""
        write_file(Path(directory) / INDEX_NAME, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the index file; equal indexes have equal bytes."""
        numbers = {shard.name: number for number, shard in enumerate(self.shards)}
        shards = [[shard.name, shard.sha256, shard.size, shard.count] for shard in self.shards]
        header = {
            "format": FORMAT,
            "version": VERSION,
            "samples": len(self.rows),
            "source": self.source,
            "columns": COLUMNS,
            "shards": shards,
        }
        rows = ([numbers[r.shard], r.key, r.offset, r.length, r.sha256, r.caption] for r in self.rows)
        return seal([header, *rows])

    def rows_of(self, subject: str, role: Role = Role.INSTANCE) -> tuple[Row, ...]:
        """A subject's samples of a role in storage order; empty if it has none."""
        return self._by_subject.get((subject, role), ())

    @cached_property
    def subjects(self) -> tuple[str, ...]:
        """The ids in the index, in storage order."""
        return tuple(dict.fromkeys(subject for subject, _ in self._by_subject))

    @cached_property
    def _by_subject(self) -> dict[tuple[str, Role], tuple[Row, ...]]:
        groups: dict[tuple[str, Role], list[Row]] = {}
        for row in self.rows:
            subject, role, _ = split_key(row.key)
            groups.setdefault((subject, role), []).append(row)
        return {group: tuple(rows) for group, rows in groups.items()}


def order(count: int, start: int, n: int, seed: int, subject: str, role: Role = Role.INSTANCE) -> list[int]:
    """The sample (0..count-1) that each of the draws start..start+n-1 of a subject uses.

    Draw p belongs to epoch p // count, and an epoch is one keyed permutation: every sample exactly once. It depends on
    nothing but its arguments, so that resuming and ranks need no state.
    """
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
    if header["format"] != FORMAT or header["version"] != VERSION or header["columns"] != COLUMNS:
        raise ValueError(f"format {header['format']} {header['version']}, want {FORMAT} {VERSION}")
    shards = tuple(Shard(*shard) for shard in header["shards"])
    rows = tuple(Row(shards[line[0]].name, *line[1:]) for line in lines)
    if len(rows) != header["samples"]:
        raise ValueError(f"{len(rows)} rows for {header['samples']} samples")
    _check(rows, shards)
    return Index(rows, shards, header["source"])


def _check(rows: tuple[Row, ...], shards: tuple[Shard, ...]) -> None:
    """Nothing; ValueError if names are unsafe, keys repeat, or the rows do not fill the shards without gaps."""
    numbers = [number for row in rows for number in (row.offset, row.length)]
    numbers += [number for shard in shards for number in (shard.size, shard.count)]
    if not all(type(number) is int for number in numbers):
        raise ValueError("a size or an offset is no whole number")
    if len({row.key for row in rows}) < len(rows):
        raise ValueError("a key stands twice")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError("a shard stands twice")
    left = iter(rows)
    for shard in shards:
        if not SHARD_NAME.fullmatch(shard.name) or not DIGEST.fullmatch(shard.sha256):
            raise ValueError(f"shard {shown(shard.name)} has an unsafe name or no digest")
        end = _fill(shard, left)
        if end + TAR_END != shard.size:
            raise ValueError(f"shard {shard.name} has {shard.size} bytes for {end} in samples")
    if next(left, None) is not None:
        raise ValueError("more rows than the shards hold")


def _fill(shard: Shard, rows: Iterator[Row]) -> int:
    """The end of the last of the next `shard.count` rows, which must follow each other from the shard's start."""
    end = 0
    for _ in range(shard.count):
        row = next(rows, None)
        if row is None or row.shard != shard.name or row.offset != end or row.length <= 0 or row.length % 512:
            raise ValueError(f"rows of shard {shard.name} leave a gap or overlap after byte {end}")
        if not SUBJECT_ID.fullmatch(split_key(row.key)[0]) or not DIGEST.fullmatch(row.sha256):
            raise ValueError(f"row {shown(row.key)} has an unsafe name or no digest")
        end += row.length
    return end
