"""Which noise level each sample gets: distributions over the indices of a schedule."""

import torch
from torch import Tensor

from dbtrain.objective import DISTRIBUTIONS, load
from dbtrain.settings.config import ObjectiveConfig
from dbtrain_kernels.philox import uniform as uniform_of


def uniform(uniform_B: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Every step of the schedule alike."""
    return uniform_B


def logit_normal(uniform_B: Tensor, objective: ObjectiveConfig) -> Tensor:
    """sigmoid(mean + std z) with z standard normal (arXiv 2403.03206, eq. 19)."""
    return torch.sigmoid(objective.logit_mean + objective.logit_std * torch.special.ndtri(uniform_B))


def shifted(level_B: Tensor, shift: float) -> Tensor:
    """Relative noise levels moved towards noise: s l / (1 + (s - 1) l), which adds ln s to their logit (arXiv
    2403.03206, eq. 23)."""
    return shift * level_B / (1 + (shift - 1) * level_B)


def timestep_index(uniform_B: Tensor, objective: ObjectiveConfig, steps: int, shift: float = 1.0) -> Tensor:
    """Schedule index [B] in 0..steps-1 of uniform numbers in (0, 1), float64 [B]. Not for `stratified`."""
    level_B = shifted(load(str(DISTRIBUTIONS[objective.timesteps]))(uniform_B, objective), shift)
    return (level_B * steps).long().clamp_(0, steps - 1)


def level_words(lowest: int, highest: int, steps: int, device: torch.device) -> Tensor:
    """What `first_words` is, for indices that are drawn uniformly from `lowest` to `highest`, both included."""
    count = highest - lowest + 1
    border_S = -(-(torch.arange(steps) - lowest).clamp(0, count) * 2**32 // count)
    return border_S.to(device)


def first_words(
    objective: ObjectiveConfig, steps: int, device: torch.device, shift: float = 1.0
) -> Tensor | None:
    """Border word of each schedule index, int64 [steps]: the smallest 32-bit Philox word whose t is that index or more.

    t must be equal on every device, but floats differ in the last bit. So t is drawn by comparing a word with this
    table, integer with integer. The table is the inverse of `timestep_index`, which never falls as the word grows; it
    is found by bisection with that function. 2^32 where no word reaches an index. None for `stratified`.
    """
    if DISTRIBUTIONS[objective.timesteps] is None:
        return None
    index_S = torch.arange(steps)
    low_S, high_S = torch.full((steps,), -1), torch.full((steps,), 2**32)
    while bool((high_S - low_S > 1).any()):
        middle_S = (low_S + high_S) // 2
        reached_S = timestep_index(uniform_of(middle_S), objective, steps, shift) >= index_S
        low_S, high_S = torch.where(reached_S, low_S, middle_S), torch.where(reached_S, middle_S, high_S)
    return high_S.to(device)
