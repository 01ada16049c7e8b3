"""How sure a score is: bootstrap intervals of means, pooled or by group, and the two averages over subjects."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95
CELLS = 4_000_000
"""Drawn numbers held at once: 32 MB."""


@dataclass(frozen=True)
class Interval:
    """A statistic and its percentile bootstrap interval over subjects; `subjects` of them were resampled.

    low, high: NaN where a single subject, or none, leaves nothing to draw anew.
    """

    value: float
    low: float
    high: float
    subjects: int

    def __str__(self) -> str:
        shown = f"{self.value:.3f}"
        return shown if math.isnan(self.low) else f"{shown} [{self.low:.3f}, {self.high:.3f}]"

    def row(self) -> dict[str, float | int | None]:
        """As JSON holds it."""
        return _row(self)


def bootstrap(
    statistic: Callable[[Sequence[int]], float],
    subjects: int,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """A statistic of subject numbers with its interval: whole subjects are drawn with replacement.

    Subjects, not images, are the independent draws, so an interval over images would be too narrow. Resamples for which
    the statistic is undefined (NaN) are left out.
    """
    everyone = statistic(range(subjects))
    stream = torch.Generator("cpu").manual_seed(seed)
    draws = torch.randint(subjects, (resamples, subjects), generator=stream).tolist() if subjects > 1 else []
    found = torch.tensor([statistic(draw) for draw in draws], dtype=torch.float64)
    found = found[~found.isnan()]
    if not len(found):
        return Interval(everyone, float("nan"), float("nan"), subjects)
    tail = (1 - level) / 2
    low, high = torch.quantile(found, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(everyone, low, high, subjects)


def mean_interval(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """The mean of one value a subject, with its bootstrap interval; NaN stands for a subject without a value."""
    kept = torch.tensor([value for value in values if value == value], dtype=torch.float64)
    if not len(kept):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    return bootstrap(lambda chosen: float(kept[list(chosen)].mean()), len(kept), seed, resamples, level)


def closed_share(base: Sequence[float], tuned: Sequence[float], real: Sequence[float], seed: int = 0) -> Interval:
    """The share of the gap between the base model's and the real images' mean score that tuning closes.

    One value a subject in each; the share is of the means, because single subjects' gaps can be near 0.
    """
    rows = torch.tensor([list(base), list(tuned), list(real)], dtype=torch.float64)

    def share(chosen: Sequence[int]) -> float:
        low, got, high = rows[:, list(chosen)].mean(1).tolist()
        return (got - low) / (high - low) if high != low else float("nan")

    return bootstrap(share, rows.shape[1], seed)


@dataclass(frozen=True)
class Score:
    """The mean of `count` values and its percentile interval over the groups that they belong to; NaN for one group."""

    value: float
    low: float
    high: float
    count: int

    def row(self) -> dict[str, float | int | None]:
        """As JSON holds it."""
        return _row(self)


def _row(found: Interval | Score) -> dict[str, float | int | None]:
    """The fields by name; NaN, which JSON has not, is None."""
    return {key: None if value != value else value for key, value in vars(found).items()}


def grouped(values: Tensor, group: Tensor, seed: int = 0) -> Score:
    """The mean of values [V] and its interval: whole groups, numbered by `group` [V], are drawn with replacement.

    Values of one image (or prompt) are not independent draws, so an interval over values would be too narrow.
    """
    number = torch.unique(group, return_inverse=True)[1]
    count = torch.bincount(number).double()
    total = torch.zeros_like(count).index_add_(0, number, values.double())
    return Score(*_ratio(total, count, seed), len(values))


AVERAGES = ("macro", "micro")


def averaged(means: Sequence[float], counts: Sequence[int], average: str, seed: int = 0) -> Interval:
    """The mean over subjects from each subject's mean and number of values, with its interval over subjects.

    `macro` weighs every subject alike, `micro` every value. NaN stands for a subject without values, which is left out.
    """
    kept = [(mean, count) for mean, count in zip(means, counts) if mean == mean and count]
    mean = torch.tensor([one for one, _ in kept], dtype=torch.float64)
    weight = torch.tensor([1 if average == "macro" else count for _, count in kept], dtype=torch.float64)
    return Interval(*_ratio(mean * weight, weight, seed), len(kept))


def _ratio(total: Tensor, count: Tensor, seed: int) -> tuple[float, float, float]:
    """sum(total) / sum(count), and its percentile bootstrap interval over the entries, which a single one has not."""
    n = len(total)
    if n < 2:
        return (float(total[0] / count[0]) if n else math.nan), math.nan, math.nan
    stream = torch.Generator("cpu").manual_seed(seed)
    block = max(1, CELLS // n)
    found = []
    for start in range(0, RESAMPLES, block):
        draws = torch.randint(n, (min(block, RESAMPLES - start), n), generator=stream)
        found.append(total[draws].sum(1) / count[draws].sum(1))
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(torch.cat(found), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return float(total.sum() / count.sum()), low, high
