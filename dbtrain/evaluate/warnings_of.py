"""What a user should be warned of in a subject's results: signs of overfitting and of language drift.

The rules compare scores of one encoder with each other, so they hold for encoders of any scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.evaluate.intervals import Interval
from dbtrain.evaluate.scores import SubjectFeatures, cosines, within

PROMPT_SHARE = 0.5
"""Smallest share of the base model's prompt gap that tuning should leave."""
COPY_LIKENESS = 0.95
"""Two small pictures whose correlation is at least this look the same."""
COPY_SHARE = 0.1
"""Smallest share of copies among the generated pictures that gives a warning."""
DRIFT_SHARE = 0.5
"""Largest share of the way from the base's class images to the subject's photos that class images may have moved."""

Scores = Mapping[str, Interval]


@dataclass(frozen=True)
class Warned:
    """One warning: its kind, `overfit` or `drift`, and the measured numbers in a sentence."""

    kind: str
    text: str


def warnings_of(rows: Mapping[str, Scores], copies: float) -> list[Warned]:
    """The warnings of a subject from its rows `scores`, `base` and `real`, and its share of copied photos."""
    tuned, base, real = rows["scores"], rows["base"], rows["real"]
    warnings = []
    if "dino" in tuned and "dino" in real and tuned["dino"].value > real["dino"].value:
        resemblance = (
            f"generated images resemble the photos more ({tuned['dino'].value:.3f}) than "
            f"the photos resemble each other ({real['dino'].value:.3f})"
        )
        warnings.append(Warned("overfit", resemblance))
    kept = prompt_share(tuned, base)
    if kept is not None and kept < PROMPT_SHARE:
        effect = f"prompts have little effect: {max(kept, 0):.0%} of the base model's, want {PROMPT_SHARE:.0%}"
        warnings.append(Warned("overfit", effect))
    if copies >= COPY_SHARE:
        warnings.append(Warned("overfit", f"{copies:.0%} of the generated images are near copies of a training photo"))
    moved = drift_share(tuned, base, real)
    if moved is not None and moved > DRIFT_SHARE and tuned["pres"].low > base["pres"].high:
        drift = (
            f"the class prompt without the identifier draws the subject: it has gone {moved:.0%} "
            f"of the way to the photos (PRES {tuned['pres'].value:.3f}, before tuning "
            f"{base['pres'].value:.3f}); more priors or a larger prior.weight hold the class"
        )
        warnings.append(Warned("drift", drift))
    return warnings


def prompt_share(tuned: Scores, base: Scores) -> float | None:
    """The prompt gap after tuning, divided by that of the base model.

    None if the base's gap is undefined, or if its interval reaches 0.
    """
    if not ("prompt_gap" in tuned and "prompt_gap" in base and base["prompt_gap"].low > 0):
        return None
    return tuned["prompt_gap"].value / base["prompt_gap"].value


def drift_share(tuned: Scores, base: Scores, real: Scores) -> float | None:
    """(PRES after tuning - PRES before) / (DINO of the photos - PRES before).

    None if a score is missing, or if the base's class images are as near to the photos as the photos to each other.
    """
    if not ("pres" in tuned and "pres" in base and "dino" in real) or real["dino"].value <= base["pres"].value:
        return None
    return (tuned["pres"].value - base["pres"].value) / (real["dino"].value - base["pres"].value)


def copied(features: SubjectFeatures, likeness_NM: Tensor) -> float:
    """The share of generated images that copy a photo.

    A copy correlates with a photo as a small picture (`likeness_NM`), and the identity encoder puts it nearer to that
    photo than any two photos are to each other. 0 for fewer than two photos, which cannot be compared.
    """
    pairs = within(features.real_identity_MD).values
    if not len(pairs) or not len(features.generated_identity_ND):
        return 0.0
    near_NM = cosines(features.generated_identity_ND, features.real_identity_MD) > pairs.max()
    return float(torch.any(near_NM & (likeness_NM >= COPY_LIKENESS), 1).double().mean())
