"""Photos and priors into WebDataset shards with an index, whole or not at all.

A stored sample is the upright RGB photo, its short side reduced to the training resolution, as PNG: cropping it gives
the very pixels that the photo itself would give. The same input gives the same bytes.

While a folder is being written it holds a locked `.writing`, and the index comes last. After a kill, the same command
removes what the dead writer left and starts over; the mark proves that those files are ours.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from dbtrain.data import tar
from dbtrain.data.index import INDEX_NAME, SHARD_NAME, TAR_END, Entry, Index, Shard, make_key
from dbtrain.data.stream import SKIPPED, read_samples
from dbtrain.errors import DataError, shown
from dbtrain.storage.atomic import TEMPORARY, held, sync_folder, write_file
from dbtrain.values import SUBJECT_ID, Sample

MAX_BYTES = 256 * 2**20
"""Size above which a shard ends, in bytes."""
MARK = ".writing"
"""File of a folder that is being written, locked by its writer."""
GROWING = ".growing"
"""The same for a folder that holds sound shards, and gets more."""
NUMBER = re.compile("[0-9]{6}")
Stored = tuple[Sample, bytes]
"""A sample and its bytes in a tar file."""


def write_shards(
    samples: Iterable[Sample], out: Path, max_bytes: int = MAX_BYTES, source: str = "", remake: bool = False
) -> Index:
    """The index of shards written into `out`, which must be empty, new, or the remains of a killed writer.

    A subject's samples must come together. `source` is kept in the index as the digest of the input. `remake` allows
    `out` to hold finished shards, which are replaced. If anything fails, `out` is left empty.
    """
    out = Path(out)
    with _claim(out, remake):
        entries, shards = _write(samples, out, 0, max_bytes)
        if not entries:
            raise DataError(f"{out}: no samples to write; check the manifest")
        index = Index(tuple(entries), tuple(shards), source)
        index.save(out)
    return index


def grow_shards(
    samples: Iterable[Sample],
    out: Path,
    made: Index,
    replaced: Collection[str] = (),
    source: str = "",
    max_bytes: int = MAX_BYTES,
) -> Index:
    """The index of a sound folder `out`, to which samples of new subjects were added, and samples of the subjects
    `replaced` in place of those that they had; without samples of theirs, they are taken out. made: its index before.

    Shards are never changed: new ones come beside them, then the index, which says what counts, then those that it no
    longer names are removed. A subject that shares a shard with a replaced one moves with it. After a kill, `tidy`
    removes what does not count.
    """
    out = Path(out)
    with held(out / GROWING) as ours:
        if not ours or Index.load(out) != made:
            raise DataError(f"{out}: another process is writing there; wait for it, then run again")
        stale = _shards_of(made, replaced)
        moved = [entry for entry in made.entries if entry.shard in stale and entry.subject not in replaced]
        first = 1 + max((int(NUMBER.findall(shard.name)[0]) for shard in made.shards), default=-1)
        added, new = _write(chain(read_samples(out, moved), samples), out, first, max_bytes)
        entries = [entry for entry in made.entries if entry.shard not in stale]
        shards = [shard for shard in made.shards if shard.name not in stale]
        index = Index((*entries, *added), (*shards, *new), source)
        index.save(out)
        tidy(out, index)
        (out / GROWING).unlink()
    return index


def _shards_of(made: Index, subjects: Collection[str]) -> set[str]:
    """The shards of some subjects, and of those that share a shard with them, and so on: a subject's samples stay
    together, in their order."""
    found: set[str] = set()
    names = set(subjects)
    while more := {entry.shard for entry in made.entries if entry.subject in names} - found:
        found |= more
        names |= {entry.subject for entry in made.entries if entry.shard in more}
    return found


def tidy(out: Path, index: Index) -> None:
    """Remove shards that the index does not name, and remains of killed writers. Only where nobody is writing."""
    named = {shard.name for shard in index.shards} | {INDEX_NAME, SKIPPED, GROWING}
    for path in out.iterdir():
        if _is_ours(path.name) and path.name not in named:
            path.unlink()
    sync_folder(out)


def _write(
    samples: Iterable[Sample], out: Path, first: int, max_bytes: int
) -> tuple[list[Entry], list[Shard]]:
    """What was written: entries and shards, whose numbers begin with `first`."""
    stored = ((sample, tar.to_tar(sample)) for sample in _checked(samples))
    entries: list[Entry] = []
    shards: list[Shard] = []
    waiting = next(stored, None)
    while waiting is not None:
        name = f"train-{first + len(shards):06d}.tar"

        def write(file: BinaryIO, name: str = name) -> None:
            nonlocal waiting
            shard, waiting = _fill(file, name, waiting, stored, max_bytes, entries)
            shards.append(shard)

        write_file(out / name, write)
    return entries, shards


def _fill(
    file: BinaryIO, name: str, item: Stored | None, following: Iterator[Stored], max_bytes: int, entries: list[Entry]
) -> tuple[Shard, Stored | None]:
    """(the shard written into an open file, the first item that is not in it; None at the end): `item` and those that
    follow, while they fit, one at least. `entries` grows by them."""
    whole, size, count = hashlib.sha256(), 0, 0
    while item is not None and (count == 0 or size + len(item[1]) + TAR_END <= max_bytes):
        sample, content = item
        proof, masked = hashlib.sha256(content).hexdigest(), sample.mask is not None
        entries.append(Entry(name, sample.key, size, len(content), proof, sample.caption, masked))
        file.write(content)
        whole.update(content)
        size, count, item = size + len(content), count + 1, next(following, None)
    file.write(bytes(TAR_END))
    whole.update(bytes(TAR_END))
    return Shard(name, whole.hexdigest(), size + TAR_END, count), item


def _checked(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The samples as they come. DataError for unsafe or repeated names, or a subject that comes back after another."""
    subjects: set[str] = set()
    keys: set[str] = set()
    current = None
    for sample in samples:
        if sample.subject != current:
            if sample.subject in subjects or not SUBJECT_ID.fullmatch(sample.subject):
                raise DataError(
                    f"subject {shown(sample.subject)}: its samples do not come together, or its id is unsafe"
                )
            subjects.add(sample.subject)
            keys, current = set(), sample.subject
        number = sample.key.rpartition("-")[2]
        safe = number.isascii() and number.isdigit() and sample.key == make_key(current, sample.role, int(number))
        if not safe or sample.key in keys or sample.extension not in tar.IMAGE_EXTENSIONS:
            raise DataError(
                f"sample {shown(sample.key)}: its key repeats or is malformed, or .{sample.extension} is no image"
            )
        keys.add(sample.key)
        yield sample


@contextmanager
def _claim(out: Path, remake: bool) -> Iterator[None]:
    """Hold the folder for one writer. Raises DataError where it holds other files, or another process writes there."""
    out.mkdir(parents=True, exist_ok=True)
    found = [path.name for path in out.iterdir()]
    taken = [] if MARK in found else [name for name in found if not (remake and _is_ours(name))]
    if taken:
        raise DataError(f"{out}: is not empty ({shown(min(taken))}); choose another --out, or move its content away")
    with held(out / MARK) as ours:
        if not ours:
            raise DataError(f"{out}: another process is writing there; wait for it, then run again")
        _sweep(out)
        try:
            yield
        except BaseException:
            # Should this fail too, the mark stays, and the next run sweeps.
            _sweep(out)
            (out / MARK).unlink()
            raise
        (out / MARK).unlink()
        sync_folder(out)


def _is_ours(name: str) -> bool:
    """Whether a name in a shard folder is a shard, the index, or an unfinished one of these."""
    whole = name
    if name.startswith(".") and name.endswith(TEMPORARY):
        whole = name[1:].removesuffix(TEMPORARY).rpartition(".")[0]
    return SHARD_NAME.fullmatch(whole) is not None or whole in (INDEX_NAME, SKIPPED, GROWING)


def _sweep(out: Path) -> None:
    """Remove all shards, the index and remains of them from the folder, the index first."""
    (out / INDEX_NAME).unlink(missing_ok=True)
    for path in out.iterdir():
        if _is_ours(path.name):
            path.unlink()
