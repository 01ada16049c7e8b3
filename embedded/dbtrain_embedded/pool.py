"""Pools: scenes that are drawn once to disk, for the training stages to read.

pictures.npy  uint8 (N, 64, 64, 3)      facts.json  [[caption, *FACTS], ...]
latents.npy   float16 (N, 16, 8, 8)     normalized means of the VAE's posteriors
"""

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from dbtrain_embedded import world

HELD_OUT_SEED = 10_000_000
"""Scenes of this seed and all higher ones are in no pool. Measurements use them."""
FACTS = ("sprite", "colour", "noun", "place", "style", "accessory", "view")


def _draw_block(bounds: tuple) -> tuple:
    """(pictures, rows of facts.json) of the seeds first..last-1, where `bounds` is (first, last)."""
    pictures, rows = [], []
    for seed in range(*bounds):
        image, caption, facts = world.scene(seed)
        pictures.append(np.asarray(image))
        rows.append([caption, *(facts[name] for name in FACTS)])
    return np.stack(pictures), rows


def draw(work: Path, count: int, first_seed: int = 0, workers: int = 2) -> None:
    """Write `count` scenes of consecutive seeds to `work`: pictures.npy and facts.json."""
    pictures = np.lib.format.open_memmap(work / "pictures.npy", "w+", np.uint8, (count, world.SIDE, world.SIDE, 3))
    end = first_seed + count
    blocks = [(start, min(start + 1000, end)) for start in range(first_seed, end, 1000)]
    rows = []
    with ProcessPoolExecutor(workers) as executor:
        for (start, stop), (images, block) in zip(blocks, executor.map(_draw_block, blocks), strict=True):
            pictures[start - first_seed : stop - first_seed] = images
            rows += block
    pictures.flush()
    (work / "facts.json").write_text(json.dumps(rows), encoding="utf-8")


def pictures(work: Path) -> np.ndarray:
    """The pool's pictures, memory-mapped."""
    return np.load(work / "pictures.npy", mmap_mode="r")


def facts(work: Path) -> list:
    """A dict for each scene of the pool: its caption and its `FACTS`."""
    rows = json.loads((work / "facts.json").read_text("utf-8"))
    return [dict(zip(("caption", *FACTS), row, strict=True)) for row in rows]


def held_out(count: int, first: int = 0, split: str = "train") -> tuple:
    """(uint8 pictures (count, 64, 64, 3), captions, facts) of scenes that are in no pool."""
    scenes = [world.scene(HELD_OUT_SEED + first + index, split) for index in range(count)]
    images, captions, facts = zip(*scenes, strict=True)
    return np.stack([np.asarray(image) for image in images]), list(captions), list(facts)


def to_tensor(images: np.ndarray):
    """The pictures as float32 (N, 3, height, width) in [-1, 1], in channels-last memory, on the training device.

    images: uint8 (N, height, width, 3).
    """
    import torch

    from dbtrain_embedded.loops import device

    return torch.from_numpy(images).to(device()).permute(0, 3, 1, 2).float().div(127.5).sub(1)
