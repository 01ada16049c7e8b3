"""The paper's scores as pure functions of features, their averages over subjects, and bootstrap intervals.

Source: DreamBooth (arXiv 2208.12242), section 4 and tables 1, 3 and 4. The paper leaves open macro or micro averaging,
self pairs in the row of real images, and the identifier in CLIP-T's text: both averages and both texts are given,
self pairs are left out. Arithmetic is float64. Letters: N generated, M real, P class images, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


def _none() -> Tensor:
    return torch.zeros(0, 1)


@dataclass(frozen=True)
class SubjectFeatures:
    """What a subject's scores are made of; a part that was not made is empty, and its scores are then undefined.

    generated_*: of the N evaluation images, whose prompts are numbered by `prompt_N`. texts_*: of the prompt of each of
    these images, with and without the identifier. class_*: of P images of the plain class prompt after tuning.
    lpips_pairs: LPIPS of all pairs of images of one prompt, where that was measured.
    """

    real_identity_MD: Tensor = field(default_factory=_none)
    real_clip_MD: Tensor = field(default_factory=_none)
    generated_identity_ND: Tensor = field(default_factory=_none)
    generated_clip_ND: Tensor = field(default_factory=_none)
    prompt_N: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    texts_with_identifier_ND: Tensor = field(default_factory=_none)
    texts_without_identifier_ND: Tensor = field(default_factory=_none)
    class_identity_PD: Tensor = field(default_factory=_none)
    lpips_pairs: Tensor = field(default_factory=lambda: torch.zeros(0))


def cosines(first_ND: Tensor, second_MD: Tensor) -> Tensor:
    """Cosine of every row with every row [N, M], float64; the rows need not be of unit length."""
    if not len(first_ND) or not len(second_MD):
        return torch.zeros(len(first_ND), len(second_MD), dtype=torch.float64)
    first_ND, second_MD = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (first_ND, second_MD))
    return first_ND @ second_MD.T


def across(first_ND: Tensor, second_MD: Tensor) -> Tensor:
    """Cosines [N * M] of all pairs of a row here and a row there."""
    return cosines(first_ND, second_MD).flatten()


def within(rows_ND: Tensor) -> Tensor:
    """Cosines [N (N - 1) / 2] of all pairs of different rows; a row is never paired with itself."""
    n = len(rows_ND)
    first, second = torch.triu_indices(n, n, 1)
    return cosines(rows_ND, rows_ND)[first, second]


def paired(first_ND: Tensor, second_ND: Tensor) -> Tensor:
    """Cosines [N] of row i here with row i there."""
    if len(first_ND) != len(second_ND):
        raise ValueError(f"paired rows must be equally many, got {len(first_ND)} and {len(second_ND)}")
    if not len(first_ND):
        return torch.zeros(0, dtype=torch.float64)
    return torch.nn.functional.cosine_similarity(first_ND.double(), second_ND.double(), dim=-1, eps=1e-30)


def spread(rows_ND: Tensor, prompt_N: Tensor) -> Tensor:
    """1 - cosine of all pairs of different images of the same prompt."""
    groups = [within(rows_ND[prompt_N == number]) for number in prompt_N.unique()]
    return 1 - torch.cat([torch.zeros(0, dtype=torch.float64), *groups])


@dataclass(frozen=True)
class Metric:
    """One score: the values that it averages for one subject, and how to read it."""

    name: str
    better: Literal["higher", "lower"]
    encoder: Literal["identity", "pair", "lpips"]
    values: Callable[[SubjectFeatures], Tensor]
    meaning: str


METRICS: dict[str, Metric] = {
    "identity": Metric(
        "identity (DINO's role)",
        "higher",
        "identity",
        lambda s: across(s.generated_identity_ND, s.real_identity_MD),
        "cosine of generated and real images, all pairs",
    ),
    "clip_i": Metric(
        "CLIP-I",
        "higher",
        "pair",
        lambda s: across(s.generated_clip_ND, s.real_clip_MD),
        "cosine of generated and real images, all pairs",
    ),
    "clip_t": Metric(
        "CLIP-T, with identifier",
        "higher",
        "pair",
        lambda s: paired(s.generated_clip_ND, s.texts_with_identifier_ND),
        "plain cosine of a generated image and its prompt, identifier kept",
    ),
    "clip_t_plain": Metric(
        "CLIP-T, without identifier",
        "higher",
        "pair",
        lambda s: paired(s.generated_clip_ND, s.texts_without_identifier_ND),
        "plain cosine of a generated image and its prompt, identifier left out",
    ),
    "pres": Metric(
        "PRES",
        "lower",
        "identity",
        lambda s: across(s.class_identity_PD, s.real_identity_MD),
        "cosine of the class prompt's images after tuning and the subject's real images: language drift",
    ),
    "div_lpips": Metric(
        "DIV (LPIPS)",
        "higher",
        "lpips",
        lambda s: s.lpips_pairs.double(),
        "LPIPS between images of one subject and prompt",
    ),
    "div_identity": Metric(
        "DIV (1 - identity cosine)",
        "higher",
        "identity",
        lambda s: spread(s.generated_identity_ND, s.prompt_N),
        "1 - cosine between images of one subject and prompt; stands in where LPIPS is not installed",
    ),
    "real_identity": Metric(
        "real images, identity",
        "higher",
        "identity",
        lambda s: within(s.real_identity_MD),
        "cosine of the subject's real images, without self pairs: the scale's upper end",
    ),
    "real_clip_i": Metric(
        "real images, CLIP-I",
        "higher",
        "pair",
        lambda s: within(s.real_clip_MD),
        "cosine of the subject's real images, without self pairs: the scale's upper end",
    ),
}
"""Every score by its key in tables and JSON. A new one is a row here."""


def macro(groups: Sequence[Tensor]) -> float:
    """The mean over subjects of each subject's mean; subjects without values are left out, NaN if none has any."""
    means = [group.double().mean() for group in groups if group.numel()]
    return float(torch.stack(means).mean()) if means else float("nan")


def micro(groups: Sequence[Tensor]) -> float:
    """The mean over all values of all subjects; NaN if there are none."""
    values = torch.cat([torch.zeros(0, dtype=torch.float64), *(group.double().flatten() for group in groups)])
    return float(values.mean()) if values.numel() else float("nan")


AVERAGES: dict[str, Callable[[Sequence[Tensor]], float]] = {"macro": macro, "micro": micro}


@dataclass(frozen=True)
class Interval:
    """A statistic and its percentile bootstrap interval over subjects; `subjects` of them were resampled."""

    value: float
    low: float
    high: float
    subjects: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    statistic: Callable[[Sequence[int]], float],
    subjects: int,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """A statistic of subject numbers with its interval: whole subjects are drawn with replacement.

    Subjects, not images, are the independent draws, so an interval over images would be too narrow. Resamples for which
    the statistic is undefined (NaN) are left out.
    """
    everyone = statistic(range(subjects))
    stream = torch.Generator("cpu").manual_seed(seed)
    draws = torch.randint(subjects, (resamples, subjects), generator=stream).tolist() if subjects else []
    found = torch.tensor([statistic(draw) for draw in draws], dtype=torch.float64)
    found = found[~found.isnan()]
    if not len(found):
        return Interval(everyone, float("nan"), float("nan"), subjects)
    tail = (1 - level) / 2
    low, high = torch.quantile(found, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(everyone, low, high, subjects)


def mean_interval(values: Sequence[float], seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """The mean of one value a subject, with its bootstrap interval; NaN stands for a subject without a value."""
    kept = torch.tensor([value for value in values if value == value], dtype=torch.float64)
    if not len(kept):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    return bootstrap(lambda chosen: float(kept[list(chosen)].mean()), len(kept), seed, resamples, level)


def score(subjects: Sequence[SubjectFeatures], seed: int = 0) -> dict[str, dict[str, Interval]]:
    """metric -> {"macro", "micro"} -> interval over subjects, for all metrics that have a value."""
    table = {}
    for key, metric in METRICS.items():
        groups = [metric.values(subject) for subject in subjects]
        groups = [group for group in groups if group.numel()]
        if groups:
            table[key] = {name: _averaged(groups, average, seed) for name, average in AVERAGES.items()}
    return table


def _averaged(groups: Sequence[Tensor], average: Callable, seed: int) -> Interval:
    return bootstrap(lambda chosen: average([groups[i] for i in chosen]), len(groups), seed)


def closed_share(base: Sequence[float], tuned: Sequence[float], real: Sequence[float], seed: int = 0) -> Interval:
    """The share of the gap between the base model's and the real images' mean score that tuning closes.

    One value a subject in each; the share is of the means, because single subjects' gaps can be near 0.
    """
    rows = torch.tensor([list(base), list(tuned), list(real)], dtype=torch.float64)

    def share(chosen: Sequence[int]) -> float:
        low, got, high = rows[:, list(chosen)].mean(1).tolist()
        return (got - low) / (high - low) if high != low else float("nan")

    return bootstrap(share, rows.shape[1], seed)
