"""Class priors drawn by the frozen base, block by block, by any number of processes at once."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dbtrain.data.shards import write_shards
from dbtrain.data.stream import verify
from dbtrain.engines.world import World
from dbtrain.errors import DataError
from dbtrain.models.family import Family, Models
from dbtrain.models.sampling import generate, image_seed, make_pipeline
from dbtrain.priors.store import (
    BLOCK,
    IMPORTED,
    PriorKey,
    block_folder,
    chain,
    held_images,
    missing_blocks,
    prior_sample,
    remedy,
    write_key,
)
from dbtrain.storage.atomic import held
from dbtrain.values import Sample

POLL_S = 0.2


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
    """The number of images that this rank drew. The ranks share the blocks; after a barrier all are there and sound.

    Damaged blocks are drawn anew. If another run is drawing a block, this one waits for it.
    stop: asked between blocks; after True this function returns, and the other blocks stay missing.
    beat: called for every image, and on every look at a block that another run draws, to show that this process works.
    """
    folder = store / key.name
    # By number, not by place in the list: a slower rank already sees the blocks of the others.
    mine = [start for start in range(0, images, BLOCK) if start // BLOCK % world.size == world.rank]
    waiting = [start for start in mine if _todo(folder, start, images)]
    if waiting and key.sampler == IMPORTED:
        raise DataError(_lacking(folder, key, images))
    pipeline, drawn, said = None, 0, False
    while waiting:
        pipeline = pipeline or make_pipeline(family, models, key.sampler)
        busy = []
        for start in waiting:
            if stop():
                return drawn
            with held(folder / f".block-{start:06d}.lock") as ours:
                if not ours:
                    busy.append(start)
                    continue
                todo = _todo(folder, start, images)
                if todo:
                    write_key(folder, key)
                for block in todo:
                    report(f"priors: {key.prompt!r} images {block.start}-{block.stop - 1} of {images}")
                    samples = _draw(pipeline, key, block, batch, beat)
                    write_shards(samples, block_folder(folder, block), remake=True)
                    drawn += len(block)
        if busy and not said:
            report(f"priors: {key.prompt!r} images {busy[0]} and on are being drawn by another run; waiting for it")
            said = True
        waiting = busy
        beat()
        time.sleep(POLL_S if busy else 0)
    return drawn


def lacks_priors(store: Path, key: PriorKey, images: int) -> bool:
    """Whether some of a class's first images are missing or damaged."""
    return any(_todo(store / key.name, start, images) for start in range(0, images, BLOCK))


def _lacking(folder: Path, key: PriorKey, images: int) -> str:
    """Why a class's imported images do not suffice, and what to do."""
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


def _draw(pipeline, key: PriorKey, block: range, batch: int, beat: Callable[[], object]) -> Iterator[Sample]:
    """The images of a block, with a call of `beat` for each."""
    seeds = [image_seed(key.name, number) for number in block]
    images = generate(
        pipeline, [key.prompt] * len(block), seeds, key.resolution, key.steps, key.guidance, key.precision, batch
    )
    for number, image in zip(block, images):
        beat()
        data = io.BytesIO()
        image.save(data, "PNG")
        meta = {"height": image.height, "width": image.width, "seed": seeds[number - block.start]}
        yield prior_sample(key, number, data.getvalue(), "png", meta)
