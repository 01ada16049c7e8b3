"""Class priors: images of `a photo of a <class>` from the frozen base, made once for all its subjects.

The store's folder for a class is named by everything that decides the images. It grows block by block; a block is a
shard folder of its own, whole or absent. The process that draws a block holds the block's lock, which ends with the
process. So any number of runs can fill one store, and each image is made once. A user's own class images are imported
into a folder whose key says so. Encoded images lie beside the images, also under digests (`storage/kept_tensors.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dbtrain.data.index import INDEX_NAME, Index
from dbtrain.data.shards import MARK
from dbtrain.data.stream import read_samples, verify
from dbtrain.errors import DataError
from dbtrain.models.family import Models
from dbtrain.models.load import base_digest
from dbtrain.priors import BLOCK
from dbtrain.settings.config import RunConfig
from dbtrain.storage.atomic import held, sweep, write_file
from dbtrain.storage.kept_tensors import kept_tensor, tensor_damage
from dbtrain.subjects.prompts import fill, slug
from dbtrain.values import Role, Sample

IMPORTED = "imported"
"""The sampler of a user's own class images."""
KEY_FILE = "key.json"
LATENTS = "latents"
BLOCK_NAME = re.compile(r"block-([0-9]{6,})-([0-9]{3})")
"""The first image number of a block and its number of images."""


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


def prior_key(config: RunConfig, models: Models, class_noun: str) -> PriorKey:
    """The key of a class's priors under a run's settings."""
    prior, prompt = config.prior, fill(config.data.class_caption, class_noun=class_noun)
    if prior.sampler == IMPORTED:
        return imported_key(config, class_noun)
    model = config.model
    replaced = [str(value) for value in (model.parameterization, model.zero_terminal_snr) if value != "auto"]
    replaced += [] if model.dtype == "fp32" else [model.dtype]
    return PriorKey(
        " ".join([base_digest(models), *replaced]),
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
    held_by, blocks, start = _by_start(folder), [], 0
    while (images is None or start < images) and start in held_by:
        blocks.append(held_by[start])
        start = blocks[-1].stop
    return blocks


def all_blocks(folder: Path) -> list[range]:
    """The image numbers of every finished block of a class's folder, in order."""
    names = [BLOCK_NAME.fullmatch(path.name) for path in folder.glob("block-*")]
    blocks = [range(int(name[1]), int(name[1]) + int(name[2])) for name in names if name]
    places = {block: block_folder(folder, block) for block in blocks if block}
    done = [block for block, place in places.items() if (place / INDEX_NAME).exists() and not (place / MARK).exists()]
    return sorted(done, key=lambda block: (block.start, block.stop))


def block_folder(folder: Path, block: range) -> Path:
    """The folder of the block of these image numbers."""
    return folder / f"block-{block.start:06d}-{len(block):03d}"


def _by_start(folder: Path) -> dict[int, range]:
    """The longest block that begins at each number."""
    return {block.start: block for block in all_blocks(folder)}


def write_key(folder: Path, key: PriorKey) -> None:
    """Write into a class's folder what its images are made with."""
    content = json.dumps(asdict(key), indent=1).encode()
    with held(folder / f".{KEY_FILE}.lock", wait=True):
        sweep(folder, KEY_FILE)
        if not (folder / KEY_FILE).exists() or (folder / KEY_FILE).read_bytes() != content:
            write_file(folder / KEY_FILE, content)


def prior_sample(key: PriorKey, number: int, image: bytes, extension: str, meta: dict) -> Sample:
    """The number-th class image of a key, as it is stored."""
    name = slug(key.prompt)
    return Sample(f"{name}-{int(Role.PRIOR)}-{number}", name, Role.PRIOR, key.prompt, image, extension, meta)


def read_priors(store: Path, key: PriorKey, images: int) -> list[Sample]:
    """The first `images` priors, verified. Raises DataError where there are fewer, or where one is damaged."""
    blocks = block_folders(store / key.name, images)
    samples = [sample for block in blocks for sample in read_block(block, key.sampler)]
    if len(samples) < images:
        raise DataError(f"{store / key.name}: has {len(samples)} of {images} images; run `dbtrain prior make` again")
    return samples[:images]


def read_block(block: Path, sampler: str) -> Iterator[Sample]:
    """The samples of a block, verified."""
    try:
        yield from read_samples(block, Index.load(block).entries)
    except DataError as error:
        defect = str(error).partition(";")[0]
        raise DataError(f"{block}: {defect}; {remedy(sampler)}") from error


def remedy(sampler: str) -> str:
    """What to do about a damaged block, by the sampler of its images."""
    if sampler == IMPORTED:
        return "delete this folder and run `dbtrain prior import` again"
    return "train or run `dbtrain prior make` again, which draws it anew"


def images_digest(store: Path, key: PriorKey, images: int) -> str:
    """SHA-256 of the digests of the first `images` images. A key does not name imported images; this does."""
    entries = [entry for block in block_folders(store / key.name, images) for entry in Index.load(block).entries]
    return hashlib.sha256("".join(entry.sha256 for entry in entries[:images]).encode()).hexdigest()


def prior_moments(
    store: Path,
    key: PriorKey,
    samples: Sequence[Sample],
    about: dict,
    encode: Callable[[Sequence[Sample]], torch.Tensor],
) -> torch.Tensor:
    """The samples' encoded images, kept beside the images and encoded once for all runs on one kind of device.

    Groups of BLOCK images from number 0 are encoded together, so a larger set adds groups and changes none.
    about: what else decides the numbers: model digest, resolution, mirror images, device.
    """
    about = {**about, "torch": torch.__version__}
    parts = []
    for start in range(0, len(samples), BLOCK):
        group = samples[start : start + BLOCK]
        digest = hashlib.sha256(b"".join(hashlib.sha256(sample.image).digest() for sample in group)).hexdigest()
        place = store / key.name / LATENTS
        parts.append(kept_tensor(place, {**about, "images": digest}, partial(encode, group)))
    return torch.cat(parts)


def list_store(store: Path) -> list[dict[str, Any]]:
    """One mapping for each class folder: its key, number of images, encoded groups and size in bytes."""
    rows = []
    for folder in _class_folders(store):
        files = [path for path in folder.rglob("*") if path.is_file()]
        rows.append(
            {
                "folder": folder.name,
                **asdict(_read_key(folder)),
                "images": held_images(folder),
                "encoded_groups": len(list((folder / LATENTS).glob("*.json"))),
                "bytes": sum(path.stat().st_size for path in files),
            }
        )
    return rows


def store_damage(store: Path) -> list[str]:
    """One line for each damage in a store: of keys, blocks, encoded images. Empty means sound."""
    damage = []
    for folder in _class_folders(store):
        sampler = ""
        try:
            key = _read_key(folder)
            sampler = key.sampler
            if key.name != folder.name:
                damage.append(f"{folder / KEY_FILE}: names other images than the folder; take it out")
        except DataError as error:
            damage.append(str(error))
        damage += _block_damage(folder, sampler) + tensor_damage(folder / LATENTS)
    return damage


def _block_damage(folder: Path, sampler: str) -> list[str]:
    """One line for each defect of a class's blocks, and for each block after a gap."""
    blocks, images = all_blocks(folder), held_images(folder)
    places = [block_folder(folder, block) for block in blocks]
    damage = [f"{place}: {line.partition(';')[0]}; {remedy(sampler)}" for place in places for line in verify(place)]
    filled = "`dbtrain prior import` of the lost images" if sampler == IMPORTED else "the next run"
    apart = [place for block, place in zip(blocks, places) if block.start > images]
    return damage + [f"{place}: does not follow the blocks before it; {filled} fills the gap" for place in apart]


def _class_folders(store: Path) -> Iterator[Path]:
    if not store.is_dir():
        raise DataError(f"{store}: is no folder; give the folder of a prior store")
    return iter(sorted(path for path in store.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _read_key(folder: Path) -> PriorKey:
    try:
        return PriorKey(**json.loads((folder / KEY_FILE).read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / KEY_FILE}: cannot be read ({error}); delete {folder}, or put it back") from error
