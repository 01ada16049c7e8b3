"""Class priors: images of `a photo of a <class>` from the frozen base, made once for all its subjects.

The store's folder for a class is named by everything that decides the images. It grows block by block; a block is a
shard folder of its own, whole or absent. Whoever draws a block holds its lock, which ends with the process: any number
of runs can fill one store, and each image is made once. A user's own class images are imported into a folder whose key
says so. Encoded images lie beside the images, under digests too (`proved.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from dbtrain.atomic import held, sweep, write_file
from dbtrain.batch import Role, Sample
from dbtrain.config import RunConfig
from dbtrain.data.index import INDEX_NAME, Index
from dbtrain.data.shards import MARK, write_shards
from dbtrain.data.stream import read_samples, verify
from dbtrain.engines.engine import World
from dbtrain.errors import DataError
from dbtrain.families import Family, Models
from dbtrain.families.load import base_digest
from dbtrain.generate import generate, image_seed, make_pipeline
from dbtrain.prompts import fill
from dbtrain.proved import proved_tensor

BLOCK = 16
"""Images of a block: enough to keep a device busy, few enough to lose little when a run is stopped."""
IMPORTED = "imported"
"""The sampler of a user's own class images."""
KEY_FILE = "key.json"
LATENTS = "latents"
BLOCK_NAME = re.compile(r"block-([0-9]{6,})-([0-9]{3})")
"""The first image number of a block and its number of images."""
POLL_S = 0.2


@dataclass(frozen=True)
class PriorKey:
    """Everything that decides the images of a class."""

    model: str
    prompt: str
    sampler: str
    steps: int
    guidance: float
    resolution: int
    precision: str
    seed: int

    @property
    def name(self) -> str:
        """Folder name: the prompt, readable, and a digest of the whole key."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{slug(self.prompt)}-{digest[:16]}"


def slug(text: str) -> str:
    """A text as a short file name of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "class"


def prior_key(config: RunConfig, models: Models, class_noun: str) -> PriorKey:
    """The key of a class's priors under a run's settings."""
    prior, prompt = config.prior, fill(config.data.class_caption, class_noun=class_noun)
    if prior.sampler == IMPORTED:
        return imported_key(config, class_noun)
    model = config.model
    told = [str(one) for one in (model.parameterization, model.zero_terminal_snr) if one != "auto"]
    return PriorKey(
        " ".join([base_digest(models), *told]),
        prompt,
        prior.sampler,
        prior.steps,
        prior.guidance,
        config.data.resolution,
        config.train.precision,
        prior.seed,
    )


def imported_key(config: RunConfig, class_noun: str) -> PriorKey:
    """The key of a class's imported images: no model drew them."""
    prompt = fill(config.data.class_caption, class_noun=class_noun)
    return PriorKey("", prompt, IMPORTED, 0, 0.0, config.data.resolution, "", 0)


def missing_blocks(folder: Path, images: int, first: int = 0) -> list[range]:
    """Ranges of image numbers first..images-1 that no block holds yet; none crosses a multiple of BLOCK."""
    held_by, missing, start = _by_start(folder), [], first
    while start < images:
        stop = held_by[start].stop if start in held_by else min(start - start % BLOCK + BLOCK, images)
        if start not in held_by:
            missing.append(range(start, stop))
        start = stop
    return missing


def block_folders(folder: Path, images: int | None = None) -> list[Path]:
    """The blocks that hold the first `images` images (None is all) without a gap, in order."""
    return [block_folder(folder, block) for block in chain(folder, images)]


def held_images(folder: Path) -> int:
    """Number of images that a class's folder holds without a gap."""
    return sum(map(len, chain(folder)))


def chain(folder: Path, images: int | None = None) -> list[range]:
    """The image numbers of the blocks that hold the first `images` images (None is all) without a gap."""
    held_by, found, start = _by_start(folder), [], 0
    while (images is None or start < images) and start in held_by:
        found.append(held_by[start])
        start = found[-1].stop
    return found


def all_blocks(folder: Path) -> list[range]:
    """The image numbers of every finished block of a class's folder, in order."""
    names = [BLOCK_NAME.fullmatch(path.name) for path in folder.glob("block-*")]
    found = [range(int(name[1]), int(name[1]) + int(name[2])) for name in names if name]
    done = [block for block in found if block and _is_done(block_folder(folder, block))]
    return sorted(done, key=lambda block: (block.start, block.stop))


def block_folder(folder: Path, block: range) -> Path:
    """The folder of the block of these image numbers."""
    return folder / f"block-{block.start:06d}-{len(block):03d}"


def _is_done(block: Path) -> bool:
    return (block / INDEX_NAME).exists() and not (block / MARK).exists()


def _by_start(folder: Path) -> dict[int, range]:
    """The longest block that begins at each number."""
    return {block.start: block for block in all_blocks(folder)}


def make_priors(
    store: Path,
    key: PriorKey,
    images: int,
    family: Family,
    models: Models,
    world: World,
    batch: int,
    report: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
    beat: Callable[[], object] = lambda: None,
) -> int:
    """Number of images this rank drew; the ranks share the blocks. Afterwards (and a barrier) all are there and sound.

    Damaged blocks are drawn anew. Blocks that another run draws at this moment are waited for. `stop` is asked between
    blocks; when it says so, the rest is left for another time. `beat` is told of every image and every look at what
    another run draws, for whoever would take this process to hang.
    """
    folder = store / key.name
    # By number, not by place in the list: a slower rank already sees the blocks of the others.
    mine = [start for start in range(0, images, BLOCK) if start // BLOCK % world.size == world.rank]
    waiting = [start for start in mine if _todo(folder, start, images)]
    if waiting and key.sampler == IMPORTED:
        raise DataError(_lacking(folder, key, images))
    pipeline, drawn, told = None, 0, False
    while waiting:
        pipeline = pipeline or make_pipeline(family, models, key.sampler)
        busy = []
        for start in waiting:
            if stop():
                return drawn
            with held(folder / f".block-{start:06d}.lock") as ours:
                if ours:
                    drawn += _complete(folder, start, images, key, pipeline, batch, report, beat)
                else:
                    busy.append(start)
        if busy and not told:
            report(f"priors: {key.prompt!r} images {busy[0]} and on are being drawn by another run; waiting for it")
            told = True
        waiting = busy
        beat()
        time.sleep(POLL_S if busy else 0)
    return drawn


def _lacking(folder: Path, key: PriorKey, images: int) -> str:
    """Why a class's imported images do not do."""
    damaged = [block_folder(folder, block) for block in chain(folder, images) if verify(block_folder(folder, block))]
    if damaged:
        return f"{damaged[0]}: is damaged; {remedy(key.sampler)}"
    return (
        f"{folder}: has {held_images(folder)} sound imported images of {key.prompt!r}, want {images}; "
        "bring more with `dbtrain prior import`, or lower prior.images"
    )


def _todo(folder: Path, start: int, images: int) -> list[range]:
    """The ranges of image numbers from `start` to the next multiple of BLOCK that are missing or damaged."""
    stop = min(start + BLOCK, images)
    mine = [block for block in chain(folder) if start <= block.start < stop]
    damaged = [block for block in mine if verify(block_folder(folder, block))]
    return damaged + missing_blocks(folder, stop, start)


def _complete(
    folder: Path,
    start: int,
    images: int,
    key: PriorKey,
    pipeline,
    batch: int,
    report: Callable[[str], None],
    beat: Callable[[], object],
) -> int:
    """Number of images drawn so that the BLOCK from `start` is whole; its lock is held."""
    todo = _todo(folder, start, images)
    if todo:
        write_key(folder, key)
    for block in todo:
        report(f"priors: {key.prompt!r} images {block.start}-{block.stop - 1} of {images}")
        write_shards(_told(_draw(pipeline, key, block, batch), beat), block_folder(folder, block), remake=True)
    return sum(len(block) for block in todo)


def _told(samples: Iterator[Sample], beat: Callable[[], object]) -> Iterator[Sample]:
    for sample in samples:
        beat()
        yield sample


def write_key(folder: Path, key: PriorKey) -> None:
    """Nothing; afterwards a class's folder says what its images were made with."""
    content = json.dumps(asdict(key), indent=1).encode()
    with held(folder / f".{KEY_FILE}.lock", wait=True):
        sweep(folder, KEY_FILE)
        if not (folder / KEY_FILE).exists() or (folder / KEY_FILE).read_bytes() != content:
            write_file(folder / KEY_FILE, content)


def _draw(pipeline, key: PriorKey, block: range, batch: int) -> Iterator[Sample]:
    seeds = [image_seed(key.name, number) for number in block]
    images = generate(
        pipeline, [key.prompt] * len(block), seeds, key.resolution, key.steps, key.guidance, key.precision, batch
    )
    for number, image in zip(block, images):
        data = io.BytesIO()
        image.save(data, "PNG")
        meta = {"height": image.height, "width": image.width, "seed": seeds[number - block.start]}
        yield prior_sample(key, number, data.getvalue(), "png", meta)


def prior_sample(key: PriorKey, number: int, image: bytes, extension: str, meta: dict) -> Sample:
    """The number-th class image of a key, as it is stored."""
    name = slug(key.prompt)
    return Sample(f"{name}-{int(Role.PRIOR)}-{number}", name, Role.PRIOR, key.prompt, image, extension, meta)


def read_priors(store: Path, key: PriorKey, images: int) -> list[Sample]:
    """The first `images` priors, verified."""
    blocks = block_folders(store / key.name, images)
    samples = [sample for block in blocks for sample in read_block(block, key.sampler)]
    if len(samples) < images:
        raise DataError(f"{store / key.name}: has {len(samples)} of {images} images; run `dbtrain prior make` again")
    return samples[:images]


def read_block(block: Path, sampler: str) -> Iterator[Sample]:
    """The samples of a block, verified."""
    try:
        yield from read_samples(block, Index.load(block).rows)
    except DataError as error:
        defect = str(error).partition(";")[0]
        raise DataError(f"{block}: {defect}; {remedy(sampler)}") from error


def remedy(sampler: str) -> str:
    """What to do about a damaged block, by what its images came from."""
    if sampler == IMPORTED:
        return "delete this folder and run `dbtrain prior import` again"
    return "train or run `dbtrain prior make` again, which draws it anew"


def images_digest(store: Path, key: PriorKey, images: int) -> str:
    """SHA-256 of the index entries of the first `images` images: names imported images, which no key can."""
    rows = [row for block in block_folders(store / key.name, images) for row in Index.load(block).rows]
    return hashlib.sha256("".join(row.sha256 for row in rows[:images]).encode()).hexdigest()


def prior_moments(
    store: Path,
    key: PriorKey,
    samples: Sequence[Sample],
    about: dict,
    encode: Callable[[Sequence[Sample]], torch.Tensor],
) -> torch.Tensor:
    """The samples' encoded images, kept beside the images and encoded once for all runs on one kind of device.

    They are encoded in groups of BLOCK from number 0, so a larger set adds groups and changes none. `about` is what
    else decides them: model digest, resolution, mirror images, device.
    """
    about = {**about, "torch": torch.__version__}
    parts = []
    for start in range(0, len(samples), BLOCK):
        group = samples[start : start + BLOCK]
        digest = hashlib.sha256(b"".join(hashlib.sha256(one.image).digest() for one in group)).hexdigest()
        place = store / key.name / LATENTS
        parts.append(proved_tensor(place, {**about, "images": digest}, partial(encode, group)))
    return torch.cat(parts)
