"""What speaks for overfitting or language drift in a subject's scores: stated rules, no scale of any one encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.evaluate.intervals import Score
from dbtrain.evaluate.scores import SubjectFeatures, cosines, within

PROMPT_SHARE = 0.5
"""Least share of the base model's prompt gap that tuning should leave."""
COPY_LIKENESS = 0.95
"""Correlation of two small pictures from which on they are the same picture to the eye."""
COPY_SHARE = 0.1
"""Share of copies among the generated pictures from which on it is said."""
DRIFT_SHARE = 0.5
"""Largest share of the way from the base's class images to the subject's photos that the class may have gone."""

Rows = Mapping[str, Mapping[str, Score]]


@dataclass(frozen=True)
class Warned:
    """One warning: `overfit` or `drift`, and what was measured against what."""

    kind: str
    text: str


def suspicions(rows: Rows, copies: float) -> list[Warned]:
    """The warnings of a subject from its rows `scores`, `base` and `real`, and its share of copied photos."""
    tuned, base, real = rows["scores"], rows["base"], rows["real"]
    found = []
    if "dino" in tuned and "dino" in real and tuned["dino"].value > real["dino"].value:
        found.append(
            Warned(
                "overfit",
                f"generated images resemble the photos more ({tuned['dino'].value:.3f}) than "
                f"the photos resemble each other ({real['dino'].value:.3f})",
            )
        )
    kept = prompt_share(tuned, base)
    if kept is not None and kept < PROMPT_SHARE:
        found.append(
            Warned(
                "overfit",
                f"prompts have little effect: {max(kept, 0):.0%} of the base model's, want {PROMPT_SHARE:.0%}",
            )
        )
    if copies >= COPY_SHARE:
        found.append(Warned("overfit", f"{copies:.0%} of the generated images are near copies of a training photo"))
    gone = drift_share(tuned, base, real)
    if gone is not None and gone > DRIFT_SHARE and tuned["pres"].low > base["pres"].high:
        found.append(
            Warned(
                "drift",
                f"the class prompt without the identifier draws the subject: it has gone {gone:.0%} "
                f"of the way to the photos (PRES {tuned['pres'].value:.3f}, before tuning "
                f"{base['pres'].value:.3f}); more priors or a larger prior.weight hold the class",
            )
        )
    return found


def prompt_share(tuned: Mapping[str, Score], base: Mapping[str, Score]) -> float | None:
    """The prompt gap after tuning over that of the base model; None where the base's is undefined or not above 0."""
    if not ("prompt_gap" in tuned and "prompt_gap" in base and base["prompt_gap"].low > 0):
        return None
    return tuned["prompt_gap"].value / base["prompt_gap"].value


def drift_share(tuned: Mapping[str, Score], base: Mapping[str, Score], real: Mapping[str, Score]) -> float | None:
    """(PRES after tuning - before) / (DINO of the photos - PRES before); None without a gap to close."""
    if not ("pres" in tuned and "pres" in base and "dino" in real) or real["dino"].value <= base["pres"].value:
        return None
    return (tuned["pres"].value - base["pres"].value) / (real["dino"].value - base["pres"].value)


def copied(features: SubjectFeatures, likeness_NM: Tensor) -> float:
    """The share of generated images that copy a photo: alike as small pictures, and to the identity encoder nearer to
    that photo than any two photos are to each other. 0 with fewer than two photos, where nothing is to compare with."""
    pairs = within(features.real_identity_MD)
    if not len(pairs) or not len(features.generated_identity_ND):
        return 0.0
    near_NM = cosines(features.generated_identity_ND, features.real_identity_MD) > pairs.max()
    return float(torch.any(near_NM & (likeness_NM >= COPY_LIKENESS), 1).double().mean())
