"""Randomness as a function: every number is named by (seed, subject, purpose, step, draw slot, element).

Nothing here keeps state, so results do not depend on the number of ranks, on the other subjects of a pack or on
resuming. Draw slots number the samples of one step's *global* batch.
"""

import hashlib
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from dbtrain_kernels.philox import philox, uniform


class Purpose(IntEnum):
    """What a number is for; separate purposes never share counters."""

    NOISE = 1
    TIMESTEP = 2
    POSTERIOR = 3
    OFFSET = 4
    ORDER = 5
    FLIP = 6
    CROP = 7
    ADAPTER = 8
    STRATUM = 9
    AUGMENT = 10
    CAPTION = 11
    LEVEL = 12


def stream_key(seed: int, subject: str, *names: object) -> tuple[int, int]:
    """Philox key (two 32-bit words) of a subject's stream in a run, by BLAKE2b, so that near seeds share nothing."""
    text = "\x1f".join(str(part) for part in (seed, subject, *names))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


Key = tuple[int, int] | tuple[Tensor, Tensor]
"""Philox key of a subject's stream; or its two words as tensors [B], a key for each sample."""


def uniforms(key: Key, purpose: Purpose, step: int | Tensor, slots: Tensor) -> Tensor:
    """Uniform float64 [B] in (0, 1) for the draw slots [B] of a step, or of each sample's own step."""
    return uniform(philox(key, (0, slots, step, int(purpose)))[0])


@lru_cache(maxsize=1024)  # each step of an epoch asks for it, for every subject of a pack
def permutation(seed: int, subject: str, role: int, epoch: int, count: int) -> tuple[int, ...]:
    """A keyed shuffle of range(count): the order in which one epoch visits a subject's samples of a role."""
    words = philox(stream_key(seed, subject), (torch.arange(count), role, epoch, int(Purpose.ORDER)))
    # Two 32-bit words as one 63-bit number, which fits an int64: equal numbers are rare, and a stable sort orders them.
    ranks = (words[0] << 31) | (words[1] >> 1)
    return tuple(torch.argsort(ranks, stable=True).tolist())


def uniform_range(key: tuple[int, int], purpose: Purpose, count: int) -> Tensor:
    """`count` uniform float64 numbers in (0, 1), one a counter: for starting weights."""
    return uniform(philox(key, (torch.arange(count), 0, 0, int(purpose)))[0])
