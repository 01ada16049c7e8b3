"""What the inputs of all operations share: a call, the shapes of training, and numbers that are the same each time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PACKS = {"SD1.5, 1+1": (2, 4, 64, 64), "SD1.5, 16 subjects": (32, 4, 64, 64), "SDXL, 1+1": (2, 4, 128, 128)}
"""Latents [B, C, H, W] of one photo and one prior of each subject."""


@dataclass(frozen=True)
class Case:
    """One call: keyword arguments of an operation, made anew by `inputs(device=...)`.

    products: the dtype in which matrix products take their operands, which bounds float32 results too. moved: bytes
    that a call must read and write, its backward included; given for the benchmark only.
    """

    name: str
    inputs: Callable[..., dict[str, Any]]
    products: torch.dtype = torch.float32
    moved: int = 0


def seeded(device: str, seed: int) -> torch.Generator | None:
    """A generator on a device; None for `meta`, where tensors hold no numbers."""
    return None if device == "meta" else torch.Generator(device).manual_seed(seed)
