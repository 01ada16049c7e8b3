"""The paper's scores as pure functions of features: what each averages, and over what.

Source: DreamBooth (arXiv 2208.12242), section 4 and tables 1, 3 and 4. The paper leaves open macro or micro averaging,
self pairs in the row of real images, and the identifier in CLIP-T's text: both averages and both texts are given,
self pairs are left out. Arithmetic is float64. Letters: N generated, M real, P class images, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dbtrain.evaluate.intervals import Score, grouped


def _none() -> Tensor:
    return torch.zeros(0, 1)


@dataclass(frozen=True)
class SubjectFeatures:
    """What a subject's scores are made of; a part that was not made is empty, and its scores are then undefined.

    generated_*: of the N evaluation images, whose prompts are numbered by `prompt_N`. texts_*: of the prompt of each of
    these images, with and without the identifier. class_*: of P images of the plain class prompt after tuning.
    *_pairs: LPIPS, DreamSim, and `patches.patch_distances`, of all pairs of images of one prompt, whose numbers are
    `pair_prompt` (empty: not told, and each pair is then taken to stand for itself).
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
    dreamsim_pairs: Tensor = field(default_factory=lambda: torch.zeros(0))
    pair_prompt: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    patch_pairs: Tensor = field(default_factory=lambda: torch.zeros(0))


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
    """Cosines [N (N - 1)] of every row with every other row; a row is never paired with itself."""
    n = len(rows_ND)
    return cosines(rows_ND, rows_ND)[~torch.eye(n, dtype=torch.bool)]


def paired(first_ND: Tensor, second_ND: Tensor) -> Tensor:
    """Cosines [N] of row i here with row i there."""
    if len(first_ND) != len(second_ND):
        raise ValueError(f"paired rows must be equally many, got {len(first_ND)} and {len(second_ND)}")
    if not len(first_ND):
        return torch.zeros(0, dtype=torch.float64)
    return torch.nn.functional.cosine_similarity(first_ND.double(), second_ND.double(), dim=-1, eps=1e-30)


def matched(images_ND: Tensor, texts_ND: Tensor) -> Tensor:
    """`paired`, or nothing where there are no texts: the base model, for one, is told no identifier."""
    return paired(images_ND if len(texts_ND) else texts_ND, texts_ND)


def spread(rows_ND: Tensor, prompt_N: Tensor) -> Tensor:
    """1 - cosine of every image with every other image of the same prompt, prompt by prompt."""
    groups = [within(rows_ND[prompt_N == number]) for number in prompt_N.unique()]
    return 1 - torch.cat([torch.zeros(0, dtype=torch.float64), *groups])


def prompt_gap(images_ND: Tensor, texts_ND: Tensor, prompt_N: Tensor) -> Tensor:
    """Cosine of each image with its own text, minus its mean cosine with the texts of the other prompts [N].

    Encoders differ in the level of CLIP-T and hardly in this; it is 0 where prompts have no effect.
    """
    other_NN = (prompt_N[:, None] != prompt_N[None, :]).double()
    if not len(images_ND) or not len(texts_ND) or not other_NN.any():
        return torch.zeros(0, dtype=torch.float64)
    cosine_NN = cosines(images_ND, texts_ND)
    return cosine_NN.diagonal() - (cosine_NN * other_NN).sum(1) / other_NN.sum(1)


def each(first_ND: Tensor, per_row: int) -> Tensor:
    """Row numbers [N * per_row] of values that stand row by row."""
    return torch.arange(len(first_ND)).repeat_interleave(max(per_row, 0))


def _of_prompt(prompt_N: Tensor) -> Tensor:
    """The prompt number of each value of `spread`."""
    numbers, sizes = prompt_N.unique(return_counts=True)
    return numbers.repeat_interleave(sizes * (sizes - 1))


def _of_pair(pairs: Tensor, prompt: Tensor) -> Tensor:
    """The prompt number of each pair, or the pair's own."""
    return prompt if len(prompt) else torch.arange(len(pairs))


@dataclass(frozen=True)
class Metric:
    """One score: the values that it averages for one subject, and how to read it.

    score: its name in evaluation.json; of several metrics with one name, the first that has values is taken. row:
    `tuned` metrics are of generated images (and of the base model's, which stand in for them), `real` ones of photos.
    unit: the number of the image or prompt that each value belongs to, which a subject's interval draws anew.
    """

    name: str
    score: str
    row: Literal["tuned", "real"]
    better: Literal["higher", "lower"]
    encoder: Literal["identity", "pair", "lpips", "dreamsim"]
    values: Callable[[SubjectFeatures], Tensor]
    unit: Callable[[SubjectFeatures], Tensor]
    meaning: str


METRICS: dict[str, Metric] = {
    "identity": Metric(
        "identity (DINO's role)",
        "dino",
        "tuned",
        "higher",
        "identity",
        lambda s: across(s.generated_identity_ND, s.real_identity_MD),
        lambda s: each(s.generated_identity_ND, len(s.real_identity_MD)),
        "likeness to the photos: cosine of every image with every photo, identity encoder",
    ),
    "clip_i": Metric(
        "CLIP-I",
        "clip_i",
        "tuned",
        "higher",
        "pair",
        lambda s: across(s.generated_clip_ND, s.real_clip_MD),
        lambda s: each(s.generated_clip_ND, len(s.real_clip_MD)),
        "likeness to the photos: cosine of every image with every photo, CLIP",
    ),
    "clip_t": Metric(
        "CLIP-T, with identifier",
        "clip_t",
        "tuned",
        "higher",
        "pair",
        lambda s: matched(s.generated_clip_ND, s.texts_with_identifier_ND),
        lambda s: each(s.texts_with_identifier_ND, 1),
        "agreement with the prompt: cosine of an image and its text, identifier kept",
    ),
    "clip_t_plain": Metric(
        "CLIP-T, without identifier",
        "clip_t_plain",
        "tuned",
        "higher",
        "pair",
        lambda s: matched(s.generated_clip_ND, s.texts_without_identifier_ND),
        lambda s: each(s.texts_without_identifier_ND, 1),
        "agreement with the prompt: cosine of an image and its text, identifier left out",
    ),
    "prompt_gap": Metric(
        "prompt gap",
        "prompt_gap",
        "tuned",
        "higher",
        "pair",
        lambda s: prompt_gap(s.generated_clip_ND, s.texts_without_identifier_ND, s.prompt_N),
        lambda s: each(prompt_gap(s.generated_clip_ND, s.texts_without_identifier_ND, s.prompt_N), 1),
        "how much prompts decide: CLIP-T without identifier, minus the same with the other prompts' texts",
    ),
    "pres": Metric(
        "PRES",
        "pres",
        "tuned",
        "lower",
        "identity",
        lambda s: across(s.class_identity_PD, s.real_identity_MD),
        lambda s: each(s.class_identity_PD, len(s.real_identity_MD)),
        "the class drawn as the subject: cosine of the class prompt's images with every photo",
    ),
    "div_lpips": Metric(
        "DIV (LPIPS)",
        "div",
        "tuned",
        "higher",
        "lpips",
        lambda s: s.lpips_pairs.double(),
        lambda s: _of_pair(s.lpips_pairs, s.pair_prompt),
        "how far apart images of one prompt are, by LPIPS or the distance named in its place",
    ),
    "div_dreamsim": Metric(
        "DIV (DreamSim)",
        "div",
        "tuned",
        "higher",
        "dreamsim",
        lambda s: s.dreamsim_pairs.double(),
        lambda s: _of_pair(s.dreamsim_pairs, s.pair_prompt),
        "DreamSim between images of one subject and prompt, where it is asked for",
    ),
    "div_patches": Metric(
        "DIV (patch distance)",
        "div",
        "tuned",
        "higher",
        "identity",
        lambda s: s.patch_pairs.double(),
        lambda s: _of_pair(s.patch_pairs, s.pair_prompt),
        "LPIPS's form over the identity encoder's patches; stands in where LPIPS is not installed",
    ),
    "div_identity": Metric(
        "DIV (1 - identity cosine)",
        "div",
        "tuned",
        "higher",
        "identity",
        lambda s: spread(s.generated_identity_ND, s.prompt_N),
        lambda s: _of_prompt(s.prompt_N[: len(s.generated_identity_ND)]),
        "1 - cosine between images of one subject and prompt: blind to pose, which that encoder ignores",
    ),
    "real_identity": Metric(
        "real images, identity",
        "dino",
        "real",
        "higher",
        "identity",
        lambda s: within(s.real_identity_MD),
        lambda s: each(s.real_identity_MD, len(s.real_identity_MD) - 1),
        "cosine of the subject's real images, without self pairs: the scale's upper end",
    ),
    "real_clip_i": Metric(
        "real images, CLIP-I",
        "clip_i",
        "real",
        "higher",
        "pair",
        lambda s: within(s.real_clip_MD),
        lambda s: each(s.real_clip_MD, len(s.real_clip_MD) - 1),
        "cosine of the subject's real images, without self pairs: the scale's upper end",
    ),
}
"""Every metric by its key. A new one is a function and a row here; evaluation.json, tables and the report follow."""
SCORES = {
    score: next(metric for metric in METRICS.values() if metric.score == score)
    for score in dict.fromkeys(metric.score for metric in METRICS.values())
}
"""Every score by its name in evaluation.json, with the first metric that gives it: what it means, and which way."""


def title(score: str) -> str:
    """A score's name in tables: `clip_t_plain` is CLIP-T-PLAIN."""
    return score.upper().replace("_", "-")


def subject_scores(features: SubjectFeatures, row: Literal["tuned", "real"], seed: int = 0) -> dict[str, Score]:
    """A subject's scores of a row by their names in evaluation.json; those without values are left out."""
    found: dict[str, Score] = {}
    for metric in METRICS.values():
        values = metric.values(features)
        if metric.row == row and metric.score not in found and values.numel():
            found[metric.score] = grouped(values, metric.unit(features), seed)
    return found
