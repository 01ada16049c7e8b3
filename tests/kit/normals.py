"""Named normal numbers in plain PyTorch: what `noising` must draw."""

import math

import torch
from torch import Tensor

from dbtrain.randomness import Key, Purpose
from dbtrain_kernels.philox import normal, philox


def normals(key: Key, purpose: Purpose, step: int | Tensor, slots: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [B, *shape] for the draw slots [B] of a step (or of each sample's), on their device."""
    count = math.prod(shape)
    blocks = torch.arange((count + 3) // 4, device=slots.device)
    low, high = (word[:, None] if isinstance(word, Tensor) else word for word in key)
    turn = step[:, None] if isinstance(step, Tensor) else step
    words = philox((low, high), (blocks[None, :], slots[:, None], turn, int(purpose)))
    return normal(words).flatten(1)[:, :count].reshape(len(slots), *shape)
