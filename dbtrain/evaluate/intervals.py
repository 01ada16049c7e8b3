"""How sure a score is: bootstrap intervals of means, and the two averages over subjects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95
CELLS = 4_000_000
"""Largest number of drawn indices in memory at once: 32 MB."""
AVERAGES = ("macro", "micro")


@dataclass(frozen=True)
class Interval:
    """A mean, its percentile bootstrap interval, and the number of values (or of subjects) that were averaged.

    value is NaN if nothing was averaged. low and high are NaN if there are fewer than two groups to resample.
    """

    value: float
    low: float
    high: float
    count: int

    def row(self, counted: str = "count") -> dict[str, float | int | None]:
        """The interval as JSON: NaN becomes None, and the count is called `counted`."""
        cells = {"value": self.value, "low": self.low, "high": self.high}
        return {**{key: None if math.isnan(cell) else cell for key, cell in cells.items()}, counted: self.count}


def shown(row: Mapping[str, float | int | None]) -> str:
    """An interval's JSON as text: `0.689 [0.471, 0.906]`, `0.689` without low and high, empty without a value."""
    if row["value"] is None:
        return ""
    value = f"{row['value']:.3f}"
    return value if row["low"] is None else f"{value} [{row['low']:.3f}, {row['high']:.3f}]"


def grouped(values: Tensor, group: Tensor, seed: int = 0) -> Interval:
    """The mean of values [V] with its interval; `group` [V] numbers the group of each value.

    Whole groups are drawn with replacement. Values of one image (or prompt) depend on each other, so drawing single
    values would give an interval that is too narrow.
    """
    number = torch.unique(group, return_inverse=True)[1]
    count = torch.bincount(number).double()
    total = torch.zeros_like(count).index_add_(0, number, values.double())
    return Interval(*ratio(total, count, seed), len(values))


def averaged(means: Sequence[float], counts: Sequence[int], average: str, seed: int = 0) -> Interval:
    """The mean over subjects with its interval, from each subject's mean and its number of values.

    `macro` gives every subject the same weight, `micro` every value. Subjects without values (NaN) are left out.
    """
    kept = [(mean, count) for mean, count in zip(means, counts) if mean == mean and count]
    mean = torch.tensor([mean for mean, _ in kept], dtype=torch.float64)
    weight = torch.tensor([1 if average == "macro" else count for _, count in kept], dtype=torch.float64)
    return Interval(*ratio(mean * weight, weight, seed), len(kept))


def ratio(total_G: Tensor, count_G: Tensor, seed: int) -> tuple[float, float, float]:
    """sum(total) / sum(count) over all groups, and the ends of its percentile bootstrap interval.

    A mean over groups of unequal sizes is such a ratio, so one bootstrap serves all statistics here. Resamples whose
    counts sum to 0 have no ratio and are left out.
    """
    groups = len(total_G)
    value = float(total_G.sum() / count_G.sum()) if count_G.sum() else math.nan
    if groups < 2:
        return value, math.nan, math.nan
    stream = torch.Generator("cpu").manual_seed(seed)
    block = max(1, CELLS // groups)
    resampled = []
    for start in range(0, RESAMPLES, block):
        draws = torch.randint(groups, (min(block, RESAMPLES - start), groups), generator=stream)
        resampled.append(total_G[draws].sum(1) / count_G[draws].sum(1))
    ratios = torch.cat(resampled)
    ratios = ratios[ratios.isfinite()]
    if not len(ratios):
        return value, math.nan, math.nan
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(ratios, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return value, low, high
