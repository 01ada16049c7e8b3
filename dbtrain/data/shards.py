"""Photos and priors into WebDataset shards with an index, whole or not at all.

A stored sample is the upright RGB photo, its short side reduced to the training resolution, as PNG: cropping it gives
the very pixels that the photo itself would give. The same input gives the same bytes.

While a folder is being written it holds a locked `.writing`; the index comes last. After a kill, the same command takes
away what the dead writer left (the mark proves that those files are ours) and starts over.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dbtrain.data import tar
from dbtrain.data.index import INDEX_NAME, SHARD_NAME, TAR_END, Entry, Index, Shard, make_key
from dbtrain.data.stream import SKIPPED
from dbtrain.errors import DataError, shown
from dbtrain.storage.atomic import TEMPORARY, held, sync_folder, write_file
from dbtrain.values import SUBJECT_ID, Sample

MAX_BYTES = 256 * 2**20
"""Size above which a shard ends, in bytes."""
MARK = ".writing"


def write_shards(
    samples: Iterable[Sample], out: Path, max_bytes: int = MAX_BYTES, source: str = "", remake: bool = False
) -> Index:
    """The index of shards written into `out`, which must be empty, new, or the remains of a killed writer.

    A subject's samples must come together. `source` is kept in the index as the digest of the input. `remake` allows
    `out` to hold finished shards, which are replaced. If anything fails, `out` is left empty.
    """
    out = Path(out)
    with _claim(out, remake):
        packed = _Peeking((sample, tar.pack(sample)) for sample in _checked(samples))
        entries: list[Entry] = []
        shards: list[Shard] = []
        while packed.peek() is not None:
            name = f"train-{len(shards):06d}.tar"

            def write(file: BinaryIO, name: str = name) -> None:
                shards.append(_fill(file, name, packed, max_bytes, entries))

            write_file(out / name, write)
        if not entries:
            raise DataError(f"{out}: no samples to write; check the manifest")
        index = Index(tuple(entries), tuple(shards), source)
        index.save(out)
    return index


class _Peeking:
    """An iterator that can be looked into one item ahead."""

    def __init__(self, items: Iterable):
        self._items = iter(items)
        self._next: deque = deque()

    def peek(self) -> tuple[Sample, bytes] | None:
        """The next item, which stays; None at the end."""
        if not self._next:
            self._next.append(next(self._items, None))
        return self._next[0]

    def take(self) -> tuple[Sample, bytes]:
        """The next item, which must be there."""
        item = self.peek()
        assert item is not None
        self._next.popleft()
        return item


def _fill(file: BinaryIO, name: str, packed: _Peeking, max_bytes: int, entries: list[Entry]) -> Shard:
    """The shard written into an open file: samples while they fit, one at least; `entries` grows by them."""
    whole, size, count = hashlib.sha256(), 0, 0
    while (item := packed.peek()) is not None and (count == 0 or size + len(item[1]) + TAR_END <= max_bytes):
        sample, content = packed.take()
        entries.append(Entry(name, sample.key, size, len(content), hashlib.sha256(content).hexdigest(), sample.caption))
        file.write(content)
        whole.update(content)
        size, count = size + len(content), count + 1
    file.write(bytes(TAR_END))
    whole.update(bytes(TAR_END))
    return Shard(name, whole.hexdigest(), size + TAR_END, count)


def _checked(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The samples as they come; DataError for unsafe or repeated names, or a subject that comes back after another."""
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
    """The right to write shards into a folder: it holds nothing of anybody else, and nobody else is writing there."""
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
    return SHARD_NAME.fullmatch(whole) is not None or whole in (INDEX_NAME, SKIPPED)


def _sweep(out: Path) -> None:
    """Nothing; afterwards no shard, index or remains of one are in the folder. The index goes first."""
    (out / INDEX_NAME).unlink(missing_ok=True)
    for path in out.iterdir():
        if _is_ours(path.name):
            path.unlink()
