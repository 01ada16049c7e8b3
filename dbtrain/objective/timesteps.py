"""Which noise level each sample gets: distributions over the indices of a schedule."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.settings.config import ObjectiveConfig
from dbtrain_kernels.philox import uniform as uniform_of


@dataclass(frozen=True)
class Draw:
    """What a distribution may look at.

    uniform_B: float64 in (0, 1), one for each sample. slot_B: the sample's place among the `slots` samples of its
    role in the global batch. rotation: one number in (0, 1) shared by a subject's step, or that number for each sample.
    """

    uniform_B: Tensor
    slot_B: Tensor
    slots: int
    rotation: float | Tensor
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


def first_words(objective: ObjectiveConfig, steps: int, device: torch.device) -> Tensor | None:
    """Smallest 32-bit Philox word [steps], int64, that the distribution of t sends to each schedule index.

    The inverse of `timestep_index`, found by bisection with that very function; 2^32 where no word does. t is then
    drawn by comparing integers, alike on every device. None for `stratified`, which looks at more than one number.
    """
    if objective.timesteps == "stratified":
        return None
    index_S = torch.arange(steps)
    low_S, high_S = torch.full((steps,), -1), torch.full((steps,), 2**32)
    while bool((high_S - low_S > 1).any()):
        middle_S = (low_S + high_S) // 2
        uniform_S, zeros_S = uniform_of(middle_S), torch.zeros_like(middle_S)
        draw = Draw(uniform_S, zeros_S, 1, 0.0, objective.logit_mean, objective.logit_std)
        reached_S = timestep_index(objective.timesteps, draw, steps) >= index_S
        low_S, high_S = torch.where(reached_S, low_S, middle_S), torch.where(reached_S, middle_S, high_S)
    return high_S.to(device)
