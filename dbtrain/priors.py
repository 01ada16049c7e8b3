"""Class priors: images of `a photo of a <class>` from the frozen base, made once for all its subjects.

The store's folder for a class is named by everything that decides the images. It grows block by block; a block is a
shard folder of its own, whole or absent.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dbtrain.batch import Role, Sample
from dbtrain.config import RunConfig
from dbtrain.data.index import INDEX_NAME, Index
from dbtrain.data.shards import write_shards
from dbtrain.data.stream import read_samples
from dbtrain.engines.engine import World
from dbtrain.families import Family, Models
from dbtrain.families.load import base_digest
from dbtrain.generate import generate, image_seed, make_pipeline
from dbtrain.prompts import fill

BLOCK = 16
"""Images of a block: enough to keep a device busy, few enough to lose little when a run is stopped."""


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
    prior = config.prior
    return PriorKey(
        base_digest(models),
        fill(config.data.class_caption, class_noun=class_noun),
        prior.sampler,
        prior.steps,
        prior.guidance,
        config.data.resolution,
        config.train.precision,
        prior.seed,
    )


def missing_blocks(folder: Path, images: int) -> list[range]:
    """Ranges of image numbers below `images` that no block holds yet; none crosses a multiple of BLOCK."""
    missing, start = [], 0
    while start < images:
        held = _held(folder, start)
        stop = start + held if held else min(start - start % BLOCK + BLOCK, images)
        if not held:
            missing.append(range(start, stop))
        start = stop
    return missing


def _held(folder: Path, start: int) -> int:
    found = [
        int(path.name.split("-")[2]) for path in folder.glob(f"block-{start:06d}-*") if (path / INDEX_NAME).exists()
    ]
    return max(found, default=0)


def make_priors(
    store: Path,
    key: PriorKey,
    images: int,
    family: Family,
    models: Models,
    world: World,
    batch: int,
    report: Callable[[str], None] = lambda line: None,
) -> int:
    """Number of images this rank drew; the ranks share the missing blocks. Afterwards (and a barrier) all are there."""
    folder = store / key.name
    # By number, not by place in the list: a slower rank already sees the blocks of the others.
    todo = [block for block in missing_blocks(folder, images) if block.start // BLOCK % world.size == world.rank]
    if not todo:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "key.json").write_text(json.dumps(asdict(key), indent=1))
    pipeline = make_pipeline(family, models, key.sampler)
    for block in todo:
        report(f"priors: {key.prompt!r} images {block.start}-{block.stop - 1} of {images}")
        write_shards(_draw(pipeline, key, block, batch), folder / f"block-{block.start:06d}-{len(block):03d}")
    return sum(len(block) for block in todo)


def _draw(pipeline, key: PriorKey, block: range, batch: int) -> Iterator[Sample]:
    seeds = [image_seed(key.name, number) for number in block]
    images = generate(
        pipeline, [key.prompt] * len(block), seeds, key.resolution, key.steps, key.guidance, key.precision, batch
    )
    for number, image in zip(block, images):
        data = io.BytesIO()
        image.save(data, "PNG")
        yield Sample(
            f"{slug(key.prompt)}-{int(Role.PRIOR)}-{number}",
            slug(key.prompt),
            Role.PRIOR,
            key.prompt,
            data.getvalue(),
            "png",
            {"height": image.height, "width": image.width, "seed": seeds[number - block.start]},
        )


def read_priors(store: Path, key: PriorKey, images: int) -> list[Sample]:
    """The first `images` priors, verified."""
    folder = store / key.name
    samples: list[Sample] = []
    while len(samples) < images:
        start = len(samples)
        block = folder / f"block-{start:06d}-{_held(folder, start):03d}"
        samples += read_samples(block, Index.load(block).rows)
    return samples[:images]
