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

from webdataset.handlers import reraise_exception
from webdataset.tariterators import group_by_keys, tar_file_expander

from dbtrain.data import tar
from dbtrain.data.images import picture_size
from dbtrain.data.index import INDEX_NAME, SHARD_NAME, TAR_END, Index, Row, Shard
from dbtrain.data.location import Place, place_of
from dbtrain.data.prefetch import ahead
from dbtrain.errors import DataError
from dbtrain.storage.trouble import DISK_REMEDIES
from dbtrain.values import Sample

PIECE = 1 << 20
SKIPPED = "skipped.json"
"""File of a shard folder that names the subjects left out of it, each with its reasons."""
REMEDY = "remake with `dbtrain shard MANIFEST --out DIR --config RECIPE`"


def read_samples(directory: Path | str, rows: Iterable[Row], schemes: Collection[str] = ()) -> Iterator[Sample]:
    """The samples of index rows, in storage order; ranges that touch are read as one. `schemes`: see `place_of`.

    A DataError names the shard and the sample that is missing, damaged, or not what the index says; the samples before
    it have come out by then, and they are sound.
    """
    place = place_of(directory, schemes)
    ordered = sorted(set(rows), key=lambda row: (row.shard, row.offset))
    sources = ({"url": run[0].shard, "stream": _RangeReader(_verified(place, run))} for run in _runs(ordered))
    members = tar_file_expander(sources, handler=reraise_exception)
    groups = group_by_keys(members, handler=reraise_exception)
    try:
        for row, group in zip_longest(ordered, groups):
            yield _sample(row, group)
    except DataError as error:
        # webdataset adds its own arguments to exceptions that pass through it.
        raise DataError(error.args[0]) from None


def refuse_small(samples: Iterable[Sample], resolution: int, directory: Path | str) -> None:
    """Nothing; DataError for a sample that was made smaller than training wants it."""
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
    rows: dict[str, list[Row]] = {shard.name: [] for shard in index.shards}
    for row in index.rows:
        rows[row.shard].append(row)
    damage = ahead(lambda shard: _shard_damage(place, shard, rows[shard.name]), index.shards)
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


def _runs(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows in storage order, cut where their bytes do not touch."""
    run: list[Row] = []
    for row in rows:
        if run and (row.shard != run[-1].shard or row.offset != run[-1].offset + run[-1].length):
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _verified(place: Place, run: list[Row]) -> Iterator[bytes]:
    """The bytes of touching rows, one row at a time and each after its proof; then the end of a tar file."""
    with _open(place, run[0].shard) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(min(run[0].offset, size))
        for row in run:
            # Never more than there is: an index may claim any length.
            content = file.read(min(row.length, size))
            problem = _row_problem(row, content)
            if problem is not None:
                raise DataError(problem)
            yield content
    yield bytes(TAR_END)


def _row_problem(row: Row, content: bytes) -> str | None:
    """One line on what is wrong with a row's bytes; None if they are what the index says."""
    problem: str | None
    if len(content) < row.length:
        problem = f"is cut short ({len(content)} of {row.length} bytes)"
    elif hashlib.sha256(content).hexdigest() != row.sha256:
        problem = "digest differs from the index"
    else:
        problem = tar.problem(content, row.key)
    return None if problem is None else f"shard {row.shard}, sample {row.key}: {problem}; {REMEDY}"


def _sample_problem(row: Row, content: bytes) -> str | None:
    """One line on what is wrong with the sample in a row's sound members; None if nothing is."""
    group = {"__url__": row.shard, "__key__": row.key, **tar.members(content)}
    try:
        _sample(row, group)
    except DataError as error:
        return str(error)
    return None


def _sample(row: Row | None, group: dict | None) -> Sample:
    """The sample of a row out of the members webdataset grouped; DataError unless they agree in every point."""
    others = f"other samples than in the index; {REMEDY}"
    if row is None:
        assert group is not None, "zip_longest pairs nothing with nothing"
        raise DataError(f"shard {group['__url__']}: {others}")
    if group is None:
        raise DataError(f"shard {row.shard}: {others}")
    try:
        (extension,) = [name for name in tar.IMAGE_EXTENSIONS if name in group]
        sample = tar.unpack(group["__key__"], group[extension], extension, group[tar.META])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"shard {row.shard}, sample {row.key}: provenance is damaged ({error!r}); {REMEDY}") from error
    got = (group["__url__"], sample.key, sample.subject, sample.role, sample.caption)
    if got != (row.shard, row.key, row.subject, row.role, row.caption):
        raise DataError(f"shard {row.shard}, sample {row.key}: differs from the index; {REMEDY}")
    return sample


def _shard_damage(place: Place, shard: Shard, rows: list[Row]) -> list[str]:
    """One line for each damage of a shard, in one pass over its bytes."""
    whole, found = hashlib.sha256(), []
    try:
        with _open(place, shard.name) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            for row in rows:
                content = file.read(min(row.length, size))
                whole.update(content)
                found.append(_row_problem(row, content) or _sample_problem(row, content))
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
