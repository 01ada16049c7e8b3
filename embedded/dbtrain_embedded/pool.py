"""Pools: scenes drawn once to disk and read by the training stages.

pictures.npy  uint8 (N, 64, 64, 3)      facts.json  [[caption, sprite, colour, class, place, style, accessory], ...]
latents.npy   float16 (N, 16, 8, 8)     normalized means of the VAE's posterior
"""

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from dbtrain_embedded import world

HELD_OUT_SEED = 10_000_000
"""Scenes from this seed on are never in a pool: they measure."""
FACTS = ("sprite", "colour", "noun", "place", "style", "accessory", "view")


def _draw_block(bounds: tuple) -> tuple:
    """Pictures and fact rows of the seeds first..last-1 (`bounds`)."""
    pictures, rows = [], []
    for seed in range(*bounds):
        image, caption, facts = world.scene(seed)
        pictures.append(np.asarray(image))
        rows.append([caption, *(facts[name] for name in FACTS)])
    return np.stack(pictures), rows


def draw(work: Path, count: int, first_seed: int = 0, workers: int = 2) -> None:
    """Draw `count` scenes of consecutive seeds into `work`."""
    pictures = np.lib.format.open_memmap(work / "pictures.npy", "w+", np.uint8, (count, world.SIDE, world.SIDE, 3))
    blocks = [(s, min(s + 1000, first_seed + count)) for s in range(first_seed, first_seed + count, 1000)]
    facts = []
    with ProcessPoolExecutor(workers) as executor:
        for (start, stop), (images, rows) in zip(blocks, executor.map(_draw_block, blocks), strict=True):
            pictures[start - first_seed : stop - first_seed] = images
            facts += rows
    pictures.flush()
    (work / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def pictures(work: Path) -> np.ndarray:
    """The pool's pictures, memory-mapped."""
    return np.load(work / "pictures.npy", mmap_mode="r")


def facts(work: Path) -> list:
    """The pool's facts as dicts with `caption`."""
    return [
        dict(zip(("caption", *FACTS), row, strict=True)) for row in json.loads((work / "facts.json").read_text("utf-8"))
    ]


def held_out(count: int, first: int = 0, split: str = "train") -> tuple:
    """(uint8 pictures (count, 64, 64, 3), captions, facts) of scenes that no pool contains."""
    scenes = [world.scene(HELD_OUT_SEED + first + index, split) for index in range(count)]
    return np.stack([np.asarray(image) for image, _, _ in scenes]), [c for _, c, _ in scenes], [f for _, _, f in scenes]


def to_tensor(images: np.ndarray):
    """uint8 NHWC -> float NCHW in [-1, 1], channels_last, on the stage's device."""
    import torch

    from dbtrain_embedded.loops import device

    return torch.from_numpy(images).to(device()).permute(0, 3, 1, 2).float().div(127.5).sub(1)
