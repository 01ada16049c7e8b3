"""Samples out of shards: only the byte ranges asked for, each proved by its digest before anything is parsed.

webdataset walks the tar members and groups them. It never opens a name or an address itself and never decodes: image
bytes stay bytes, provenance is JSON. So its `pipe:` addresses and its pickling decoders are out of reach, whatever
WDS_SECURE says. What it would pass over in silence is compared with the index: names, counts, order.
"""

import errno
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

from dbtrain.data import tar
from dbtrain.data.images import picture_size
from dbtrain.data.index import INDEX_NAME, SHARD_NAME, TAR_END, Entry, Index, Shard
from dbtrain.data.location import Place, place_of
from dbtrain.data.prefetch import ahead
from dbtrain.errors import DataError
from dbtrain.storage.trouble import DISK_REMEDIES
from dbtrain.values import Sample

PIECE = 1 << 20
SKIPPED = "skipped.json"
"""File of a shard folder that names the subjects left out of it, each with its reasons."""
REMEDY = "remake with `dbtrain shard MANIFEST --out DIR --config RECIPE`"


def read_samples(directory: Path | str, entries: Iterable[Entry], schemes: Collection[str] = ()) -> Iterator[Sample]:
    """The samples of index entries, in storage order; ranges that touch are read as one. `schemes`: see `place_of`.

    A DataError names the shard and the sample that is missing, damaged, or not what the index says; the samples before
    it have come out by then, and they are sound.
    """
    from webdataset.handlers import reraise_exception  # loads torch, which a fleet's driver does without
    from webdataset.tariterators import group_by_keys, tar_file_expander

    place = place_of(directory, schemes)
    ordered = sorted(set(entries), key=lambda entry: (entry.shard, entry.offset))
    sources = ({"url": run[0].shard, "stream": _RangeReader(_verified(place, run))} for run in _runs(ordered))
    members = tar_file_expander(sources, handler=reraise_exception)
    groups = group_by_keys(members, handler=reraise_exception)
    try:
        for entry, group in zip_longest(ordered, groups):
            yield _sample(entry, group)
    except DataError as error:
        # webdataset adds its own arguments to exceptions that pass through it.
        raise DataError(error.args[0]) from None


def refuse_small(samples: Iterable[Sample], resolution: int, directory: Path | str) -> None:
    """Raise DataError for a sample that was stored smaller than training wants it."""
    for sample in samples:
        stored = min(picture_size(sample.image))
        had = min(sample.meta.get("width", stored), sample.meta.get("height", stored))
        if stored < min(had, resolution):
            what = f"{directory}: sample {sample.key} was stored at {stored} px, data.resolution is {resolution}"
            raise DataError(f"{what}; make the shards at that resolution, or lower it")


def verify(directory: Path | str, schemes: Collection[str] = ()) -> list[str]:
    """All damage in a shard folder, one line each: index, whole shards, samples, stray files. Empty means sound."""
    try:
        place = place_of(directory, schemes)
        index = Index.load(directory, schemes)
    except DataError as error:
        return [str(error)]
    known = {shard.name for shard in index.shards} | {INDEX_NAME, SKIPPED}
    stray = sorted(name for name in place.names() if name not in known and not name.startswith("."))
    entries: dict[str, list[Entry]] = {shard.name: [] for shard in index.shards}
    for entry in index.entries:
        entries[entry.shard].append(entry)
    damage = ahead(lambda shard: _shard_damage(place, shard, entries[shard.name]), index.shards)
    return [f"{name}: is not in the index; take it out" for name in stray] + [
        line for lines in damage for line in lines
    ]


class _RangeReader:
    """The file-like view of byte chunks that tarfile's stream mode reads from."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        part, self._rest = self._rest[:size], self._rest[size:]
        return bytes(part)


def _runs(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Rows in storage order, cut where their bytes do not touch."""
    run: list[Entry] = []
    for entry in entries:
        if run and (entry.shard != run[-1].shard or entry.offset != run[-1].offset + run[-1].length):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def _verified(place: Place, run: list[Entry]) -> Iterator[bytes]:
    """The bytes of touching entries, one entry at a time and each after its proof; then the end of a tar file."""
    with _open(place, run[0].shard) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(min(run[0].offset, size))
        for entry in run:
            # Never more than there is: an index may claim any length.
            content = file.read(min(entry.length, size))
            problem = _entry_problem(entry, content)
            if problem is not None:
                raise DataError(problem)
            yield content
    yield bytes(TAR_END)


def _entry_problem(entry: Entry, content: bytes) -> str | None:
    """One line on what is wrong with an entry's bytes; None if they are what the index says."""
    problem: str | None
    if len(content) < entry.length:
        problem = f"is cut short ({len(content)} of {entry.length} bytes)"
    elif hashlib.sha256(content).hexdigest() != entry.sha256:
        problem = "digest differs from the index"
    else:
        problem = tar.problem(content, entry.key)
    return None if problem is None else f"shard {entry.shard}, sample {entry.key}: {problem}; {REMEDY}"


def _sample_problem(entry: Entry, content: bytes) -> str | None:
    """One line on what is wrong with the sample in an entry's sound members; None if nothing is."""
    group = {"__url__": entry.shard, "__key__": entry.key, **tar.members(content)}
    try:
        _sample(entry, group)
    except DataError as error:
        return str(error)
    return None


def _sample(entry: Entry | None, group: dict | None) -> Sample:
    """The sample of an entry out of the members webdataset grouped; DataError unless they agree in every point."""
    others = f"other samples than in the index; {REMEDY}"
    if entry is None:
        assert group is not None, "zip_longest pairs nothing with nothing"
        raise DataError(f"shard {group['__url__']}: {others}")
    if group is None:
        raise DataError(f"shard {entry.shard}: {others}")
    try:
        (extension,) = [name for name in tar.IMAGE_EXTENSIONS if name in group]
        sample = tar.from_tar(group["__key__"], group[extension], extension, group[tar.META], group.get(tar.MASK))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"shard {entry.shard}, sample {entry.key}: provenance is damaged ({error!r})"
        raise DataError(f"{what}; {REMEDY}") from error
    got = (group["__url__"], sample.key, sample.subject, sample.role, sample.caption, sample.mask is not None)
    if got != (entry.shard, entry.key, entry.subject, entry.role, entry.caption, entry.masked):
        raise DataError(f"shard {entry.shard}, sample {entry.key}: differs from the index; {REMEDY}")
    return sample


def _shard_damage(place: Place, shard: Shard, entries: list[Entry]) -> list[str]:
    """One line for each damage of a shard, in one pass over its bytes."""
    whole, found = hashlib.sha256(), []
    try:
        with _open(place, shard.name) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            for entry in entries:
                content = file.read(min(entry.length, size))
                whole.update(content)
                found.append(_entry_problem(entry, content) or _sample_problem(entry, content))
            while piece := file.read(PIECE):
                whole.update(piece)
    except OSError as error:
        found.append(f"shard {shard.name}: cannot be read ({error.strerror or error}); {REMEDY}")
    except DataError as error:
        return [str(error)]
    else:
        if size != shard.size:
            found.append(f"shard {shard.name}: has {size} bytes, the index says {shard.size}; {REMEDY}")
        elif whole.hexdigest() != shard.sha256:
            found.append(f"shard {shard.name}: digest differs from the index; {REMEDY}")
    return [line for line in found if line is not None]


def _open(place: Place, name: str) -> BinaryIO:
    """A shard's file for reading; DataError unless it is a plain file that bears this very name.

    A disk that refuses is no defect of the shard: its OSError comes out as it is.
    """
    if not SHARD_NAME.fullmatch(name):
        raise DataError(f"shard {name!r}: is no shard name; {REMEDY}")
    try:
        return place.open(name)
    except OSError as error:
        if errno.errorcode.get(error.errno or 0) in DISK_REMEDIES:
            raise
        problem = error.strerror or type(error).__name__
        raise DataError(f"shard {name}: cannot be opened ({problem}), or is a link; {REMEDY}") from error
    except DataError as error:
        raise DataError(f"shard {error}; {REMEDY}") from error
