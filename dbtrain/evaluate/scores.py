"""The paper's scores as pure functions of features: which values each score averages, and how to read it.

Source: DreamBooth (arXiv 2208.12242), section 4 and tables 1, 3 and 4. The paper leaves open macro or micro averaging,
self pairs in the row of real images, and the identifier in CLIP-T's text. Here both averages and both texts are given,
and self pairs are left out. Arithmetic is float64. Letters: N generated, M real, P class images, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dbtrain.evaluate.intervals import Interval, grouped


def _none() -> Tensor:
    return torch.zeros(0, 1)


@dataclass(frozen=True)
class SubjectFeatures:
    """What a subject's scores are computed from. A part that was not made is empty; its scores are then left out.

    generated_*: of the N evaluation images, whose prompts are numbered by `prompt_N`. texts_*: of the prompt of each of
    these images, with and without the identifier. class_*: of P images of the plain class prompt after tuning.
    distance_pairs: distances of all pairs of images of one prompt; pair_prompt: the prompt's number of each pair.
    """

    real_identity_MD: Tensor = field(default_factory=_none)
    real_clip_MD: Tensor = field(default_factory=_none)
    generated_identity_ND: Tensor = field(default_factory=_none)
    generated_clip_ND: Tensor = field(default_factory=_none)
    prompt_N: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    texts_with_identifier_ND: Tensor = field(default_factory=_none)
    texts_without_identifier_ND: Tensor = field(default_factory=_none)
    class_identity_PD: Tensor = field(default_factory=_none)
    distance_pairs: Tensor = field(default_factory=lambda: torch.zeros(0))
    pair_prompt: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


class Values(NamedTuple):
    """The values [V] that a score averages, float64, and the number [V] of the image or prompt behind each value.

    A subject's interval draws whole images (or prompts) anew, with all of their values.
    """

    values: Tensor
    unit: Tensor


def by_image(values_NK: Tensor) -> Values:
    """The values of a matrix with one row an image."""
    return Values(values_NK.flatten(), torch.arange(len(values_NK)).repeat_interleave(values_NK.shape[1]))


def cosines(first_ND: Tensor, second_MD: Tensor) -> Tensor:
    """Cosine of every row with every row [N, M], float64; the rows need not be of unit length."""
    if not len(first_ND) or not len(second_MD):
        return torch.zeros(len(first_ND), len(second_MD), dtype=torch.float64)
    first_ND, second_MD = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (first_ND, second_MD))
    return first_ND @ second_MD.T


def across(first_ND: Tensor, second_MD: Tensor) -> Values:
    """Cosines [N * M] of every row of the first with every row of the second."""
    return by_image(cosines(first_ND, second_MD))


def within(rows_ND: Tensor) -> Values:
    """Cosines [N (N - 1)] of every row with every other row; a row is never paired with itself."""
    rows = len(rows_ND)
    others = cosines(rows_ND, rows_ND)[~torch.eye(rows, dtype=torch.bool)]
    return by_image(others.view(rows, max(rows - 1, 0)))


def paired(images_ND: Tensor, texts_ND: Tensor) -> Values:
    """Cosines [N] of row i of the images with row i of the texts; none where there are no texts.

    The base model, for one, is given no prompts with an identifier.
    """
    if not len(texts_ND):
        return by_image(torch.zeros(0, 1, dtype=torch.float64))
    if len(images_ND) != len(texts_ND):
        raise ValueError(f"paired rows must be equally many, got {len(images_ND)} and {len(texts_ND)}")
    cosine_N = torch.nn.functional.cosine_similarity(images_ND.double(), texts_ND.double(), dim=-1, eps=1e-30)
    return by_image(cosine_N[:, None])


def prompt_gap(images_ND: Tensor, texts_ND: Tensor, prompt_N: Tensor) -> Values:
    """Cosine of each image with its own text, minus its mean cosine with the texts of the other prompts [N].

    Encoders differ in the level of CLIP-T, but little in this gap. The gap is 0 where prompts have no effect.
    """
    other_NN = (prompt_N[:, None] != prompt_N[None, :]).double()
    if not len(images_ND) or not len(texts_ND) or not other_NN.any():
        return by_image(torch.zeros(0, 1, dtype=torch.float64))
    cosine_NN = cosines(images_ND, texts_ND)
    gap_N = cosine_NN.diagonal() - (cosine_NN * other_NN).sum(1) / other_NN.sum(1)
    return by_image(gap_N[:, None])


@dataclass(frozen=True)
class Metric:
    """One metric: which values it averages for one subject, and how to read the mean.

    score: its name in evaluation.json. Of several metrics with one name and row, the first that has values is taken.
    row: `tuned` metrics are of generated images (the base model's images are measured by the same), `real` ones of
    photos. encoder: the role of the encoder or distance that decides the values. column: whether the report's table of
    subjects has a column of it.
    """

    score: str
    encoder: Literal["identity", "clip", "distance"]
    measure: Callable[[SubjectFeatures], Values]
    meaning: str
    better: Literal["higher", "lower"] = "higher"
    row: Literal["tuned", "real"] = "tuned"
    column: bool = True


OF_PHOTOS = "cosine of the subject's real images, without self pairs: the scale's upper end"
METRICS: dict[str, Metric] = {
    "identity": Metric(
        "dino",
        "identity",
        lambda s: across(s.generated_identity_ND, s.real_identity_MD),
        "likeness to the photos: cosine of every image with every photo, identity encoder",
    ),
    "clip_i": Metric(
        "clip_i",
        "clip",
        lambda s: across(s.generated_clip_ND, s.real_clip_MD),
        "likeness to the photos: cosine of every image with every photo, CLIP",
    ),
    "clip_t": Metric(
        "clip_t",
        "clip",
        lambda s: paired(s.generated_clip_ND, s.texts_with_identifier_ND),
        "agreement with the prompt: cosine of an image and its text, identifier kept",
    ),
    "clip_t_plain": Metric(
        "clip_t_plain",
        "clip",
        lambda s: paired(s.generated_clip_ND, s.texts_without_identifier_ND),
        "agreement with the prompt: cosine of an image and its text, identifier left out",
        column=False,
    ),
    "prompt_gap": Metric(
        "prompt_gap",
        "clip",
        lambda s: prompt_gap(s.generated_clip_ND, s.texts_without_identifier_ND, s.prompt_N),
        "how much prompts decide: CLIP-T without identifier, minus the same with the other prompts' texts",
        column=False,
    ),
    "pres": Metric(
        "pres",
        "identity",
        lambda s: across(s.class_identity_PD, s.real_identity_MD),
        "the class drawn as the subject: cosine of the class prompt's images with every photo",
        better="lower",
    ),
    "div": Metric(
        "div",
        "distance",
        lambda s: Values(s.distance_pairs.double(), s.pair_prompt),
        "how far apart images of one prompt are, by LPIPS or the distance named in its place",
    ),
    "real_identity": Metric("dino", "identity", lambda s: within(s.real_identity_MD), OF_PHOTOS, row="real"),
    "real_clip_i": Metric("clip_i", "clip", lambda s: within(s.real_clip_MD), OF_PHOTOS, row="real"),
}
"""Every metric by its key. A new one is a function and a row here; evaluation.json, tables and the report follow."""
SCORES = {
    score: next(metric for metric in METRICS.values() if metric.score == score)
    for score in dict.fromkeys(metric.score for metric in METRICS.values())
}
"""Every score by its name in evaluation.json, with the first metric of that name."""


def title(score: str) -> str:
    """A score's name in tables: `clip_t_plain` is CLIP-T-PLAIN."""
    return score.upper().replace("_", "-")


def subject_scores(features: SubjectFeatures, row: Literal["tuned", "real"], seed: int = 0) -> dict[str, Interval]:
    """A subject's scores of a row by their names in evaluation.json; those without values are left out."""
    scores: dict[str, Interval] = {}
    for metric in METRICS.values():
        if metric.row == row and metric.score not in scores:
            values, unit = metric.measure(features)
            if values.numel():
                scores[metric.score] = grouped(values, unit, seed)
    return scores
