"""A made-up study of a grid of rates and steps on three subjects, for what is told of a study."""

from dbtrain.study.findings import Row
from dbtrain.study.variants import Design

VARY = (("train.lr", ("1e-3", "2e-3")), ("train.steps", ("60", "120")))
DESIGN = Design("tiny_packed", ("train.lr=1e-3", "train.steps=60"), VARY, grid=True)
VARIANTS = DESIGN.variants()
GAIN = {"a": 0.0, "b": 0.1, "c": 0.2}
"""How much better each subject is than subject a."""


def rows(noise=0.0):
    """Identity is .5, +.1 for the higher rate, +.2 for more steps; PRES rises with the rate alone."""
    made = []
    for variant in VARIANTS:
        fast, long = variant.config.train.lr > 1e-3, variant.config.train.steps > 60
        for i, (subject, gain) in enumerate(GAIN.items()):
            scores = {"dino": 0.5 + 0.1 * fast + 0.2 * long + gain + noise * (i - 1) * fast, "pres": 0.1 + 0.1 * fast}
            made.append(Row(variant.name, subject, "dog", 2.0 if long else 1.0, scores))
    return made
