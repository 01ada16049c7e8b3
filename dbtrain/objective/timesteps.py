"""Which noise level each sample gets: distributions over the indices of a schedule."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What a distribution may look at.

    uniform_B: float64 in (0, 1), one for each sample. slot_B: the sample's place among the `slots` samples of its
    role in the global batch. rotation: one number in (0, 1) shared by the step.
    """

    uniform_B: Tensor
    slot_B: Tensor
    slots: int
    rotation: float
    mean: float
    std: float


def uniform(draw: Draw) -> Tensor:
    """Every step of the schedule alike."""
    return draw.uniform_B


def stratified(draw: Draw) -> Tensor:
    """One sample in each of `slots` equal strata, rotated from step to step (arXiv 2107.00630, appendix I.1)."""
    return (draw.slot_B.double() / draw.slots + draw.uniform_B / draw.slots + draw.rotation) % 1.0


def logit_normal(draw: Draw) -> Tensor:
    """sigmoid(mean + std z) with z standard normal (arXiv 2403.03206, eq. 19)."""
    return torch.sigmoid(draw.mean + draw.std * torch.special.ndtri(draw.uniform_B))


DISTRIBUTIONS: dict[str, Callable[[Draw], Tensor]] = {
    "uniform": uniform,
    "stratified": stratified,
    "logit_normal": logit_normal,
}
"""Relative noise level in [0, 1), float64 [B]; 0 is the cleanest step of the schedule."""


def timestep_index(name: str, draw: Draw, steps: int) -> Tensor:
    """Schedule index [B] in 0..steps-1 of each sample."""
    return (DISTRIBUTIONS[name](draw) * steps).long().clamp_(0, steps - 1)
