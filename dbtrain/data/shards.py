"""Photos and priors into WebDataset shards with an index, whole or not at all.

A stored sample is the upright RGB photo, its short side reduced to the training resolution, as PNG: cropping it gives
the very pixels that the photo itself would give. The same input gives the same bytes.

While a folder is being written it holds a locked `.writing`; the index comes last. After a kill, the same command takes
away what the dead writer left (the mark proves that those files are ours) and starts over.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dbtrain.atomic import TEMPORARY, held, sync_folder, write_file
from dbtrain.batch import SUBJECT_ID, Role, Sample, Subject
from dbtrain.config import DataConfig, RunConfig
from dbtrain.data import tar
from dbtrain.data.ahead import ahead
from dbtrain.data.finding import Finding, shown
from dbtrain.data.images import encode, open_photo, read_photo, shorten
from dbtrain.data.index import FORMAT, INDEX_NAME, SHARD_NAME, TAR_END, VERSION, Index, Row, Shard, make_key
from dbtrain.data.preflight import sift
from dbtrain.data.stream import SKIPPED, verify
from dbtrain.errors import DataError

MAX_BYTES = 256 * 2**20
"""Size above which a shard ends, in bytes."""
MARK = ".writing"


def shard_manifest(
    manifest: Path,
    out: Path,
    config: RunConfig,
    say: Callable[[str], None] = print,
    skip_bad: bool = False,
    tokenizer: Any = None,
    registry: Path | None = None,
) -> Index:
    """The index of the shards that hold a manifest's photos at `data.resolution`.

    Run again on the same input it changes nothing, or remakes what is damaged, and says so; a folder made from other
    input is refused. Bad photos are all named in one DataError before anything is written. With `skip_bad`, subjects
    with findings are left out: each is told, and named with its reasons in `skipped.json`. `tokenizer` and `registry`:
    see `preflight`; photos that are in the shards already are not looked at again.
    """
    out, resolution = Path(out), config.data.resolution
    ready = config.data.shards is not None
    made = Index.load(out) if not ready and (out / INDEX_NAME).exists() and not (out / MARK).exists() else None
    photos = not ready and (made is None or skip_bad)
    subjects, findings = sift(manifest, config, tokenizer, registry, photos)
    if ready:
        return _ready_made(config.data, subjects, findings, out, skip_bad, say)
    left_out = _left_out(findings, skip_bad and bool(subjects), say)
    source = source_digest(subjects, resolution)
    if made is not None:
        damage = _repair_reason(made, source, out)
        if not damage:
            _name_left_out(out, left_out)
            say(f"{out}: is up to date, {len(made.rows)} samples of {len(made.subjects)} subjects; nothing to do")
            return made
        say("\n".join([*damage, f"{out}: is damaged; remaking it"]))
    index = write_shards(_photo_samples(subjects, resolution), out, source=source, remake=made is not None)
    _name_left_out(out, left_out)
    say(f"{out}: {len(index.rows)} samples of {len(subjects)} subjects in {len(index.shards)} shards")
    return index


def _ready_made(
    data: DataConfig,
    subjects: list[Subject],
    findings: list[Finding],
    out: Path,
    skip_bad: bool,
    say: Callable[[str], None],
) -> Index:
    """The part of ready-made shards that holds these subjects. They are only read: `skipped.json` goes into `out`."""
    place = str(data.shards)
    index = Index.load(place, data.schemes)
    remedy = "shard its photos too, or take its row out"
    absent = [subject for subject in subjects if not index.rows_of(subject.id)]
    findings = findings + [Finding(subject.id, place, "holds no photo of it", remedy) for subject in absent]
    sound = {subject.id for subject in subjects} - {subject.id for subject in absent}
    left_out = _left_out(findings, skip_bad and bool(sound), say)
    if left_out:
        out.mkdir(parents=True, exist_ok=True)
        _name_left_out(out, left_out)
    rows = tuple(row for row in index.rows if row.subject in sound and row.role == Role.INSTANCE)
    say(f"{place}: {len(rows)} samples of {len(sound)} subjects")
    return Index(rows, index.shards, index.source)


def _left_out(findings: list[Finding], skip: bool, say: Callable[[str], None]) -> dict[str, list[str]]:
    """Reasons of the subjects that are left out, by id; DataError with all of them unless that was asked for.

    A row without an id is named by its place in the manifest, such as photos.csv:4.
    """
    if findings and not skip:
        raise DataError("\n".join(finding.line() for finding in findings))
    left_out: dict[str, list[str]] = {}
    for finding in findings:
        left_out.setdefault(finding.subject or Path(finding.file).name, []).append(finding.line())
        say(f"left out: {finding.line()}")
    return left_out


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
        rows: list[Row] = []
        shards: list[Shard] = []
        while packed.peek() is not None:
            name = f"train-{len(shards):06d}.tar"

            def write(file: BinaryIO, name: str = name) -> None:
                shards.append(_fill(file, name, packed, max_bytes, rows))

            write_file(out / name, write)
        if not rows:
            raise DataError(f"{out}: no samples to write; check the manifest")
        index = Index(tuple(rows), tuple(shards), source)
        index.save(out)
    return index


def photo_samples(subject: Subject, resolution: int) -> Iterator[Sample]:
    """A subject's photos as samples to store, in their order.

    `meta` has the photo's file name, SHA-256 and upright size in pixels (`width`, `height`), and the class noun. An
    empty caption means that the run's template holds.
    """
    return _photo_samples([subject], resolution)


def source_digest(subjects: list[Subject], resolution: int) -> str:
    """SHA-256 (hex) of everything that decides what shards hold: photos, ids, classes, captions, resolution, format."""
    digest = hashlib.sha256(json.dumps([FORMAT, VERSION, resolution]).encode())
    pairs = ((subject, path) for subject in subjects for path in subject.images)
    for line in ahead(_source_line, pairs):
        digest.update(line)
    return digest.hexdigest()


def _source_line(pair: tuple[Subject, Path]) -> bytes:
    subject, path = pair
    photo = hashlib.sha256(read_photo(path)).hexdigest()
    return json.dumps([subject.id, subject.class_noun, subject.caption, path.name, photo]).encode()


def _photo_samples(subjects: list[Subject], resolution: int) -> Iterator[Sample]:
    photos = ((subject, number, path) for subject in subjects for number, path in enumerate(subject.images))
    return ahead(lambda photo: _photo_sample(*photo, resolution), photos)


def _photo_sample(subject: Subject, number: int, path: Path, resolution: int) -> Sample:
    content = read_photo(path)
    try:
        image = open_photo(content)
    except DataError as error:
        raise DataError(f"{path}: {str(error).removeprefix('photo: ')}") from error
    stored, extension = encode(shorten(image, resolution))
    meta = {
        "source": path.name,
        "source_sha256": hashlib.sha256(content).hexdigest(),
        "class": subject.class_noun,
        "width": image.width,
        "height": image.height,
    }
    key = make_key(subject.id, Role.INSTANCE, number)
    return Sample(key, subject.id, Role.INSTANCE, subject.caption or "", stored, extension, meta)


def _name_left_out(out: Path, left_out: dict[str, list[str]]) -> None:
    if left_out:
        write_file(out / SKIPPED, json.dumps(left_out, indent=1).encode())


def _repair_reason(made: Index, source: str, out: Path) -> list[str]:
    """The damage for which a folder must be remade; DataError if it was made from other input."""
    if made.source != source:
        what = f"{out}: holds shards made from other photos, captions or another resolution"
        raise DataError(f"{what}; choose another --out, or move this folder away")
    return verify(out)


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


def _fill(file: BinaryIO, name: str, packed: _Peeking, max_bytes: int, rows: list[Row]) -> Shard:
    """The shard written into an open file: samples while they fit, one at least; `rows` grows by them."""
    whole, size, count = hashlib.sha256(), 0, 0
    while (item := packed.peek()) is not None and (count == 0 or size + len(item[1]) + TAR_END <= max_bytes):
        sample, content = packed.take()
        rows.append(Row(name, sample.key, size, len(content), hashlib.sha256(content).hexdigest(), sample.caption))
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
