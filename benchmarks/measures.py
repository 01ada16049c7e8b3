"""Measures that only benchmarks take: zero-shot accuracy, the closed gap, and the spread of an encoder's features."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from dbtrain.evaluate.features import Encoder
from dbtrain.evaluate.intervals import Interval, averaged, ratio
from dbtrain.evaluate.scores import within


def choose(pair: Encoder, images: Sequence[Image.Image], options: Sequence[Sequence[str]]) -> Tensor:
    """The number [N] of the nearest text to each picture, among its own texts; all pictures have equally many texts."""
    distinct = list(dict.fromkeys(text for texts in options for text in texts))
    row_of = {text: i for i, text in enumerate(distinct)}
    texts_TD = pair.texts(distinct)
    rows_NK = torch.tensor([[row_of[text] for text in texts] for texts in options], dtype=torch.long)
    return torch.einsum("nd,nkd->nk", pair.images(images), texts_TD[rows_NK]).argmax(1)


def zero_shot(
    pair: Encoder, images: Sequence[Image.Image], options: Sequence[Sequence[str]], truth: Sequence[int]
) -> Tensor:
    """Hits [N] of zero-shot recognition, float64: 1 if the nearest of a picture's texts is the true one, else 0."""
    return (choose(pair, images, options) == torch.tensor(truth)).double()


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of one value a subject, with its interval over subjects; NaN is a subject without a value."""
    return averaged(values, [1] * len(values), "macro")


def closed_share(base: Sequence[float], tuned: Sequence[float], real: Sequence[float], seed: int = 0) -> Interval:
    """The share of the gap between the base model's and the real images' mean score that tuning closes.

    Each sequence holds one value a subject. The share is (tuned - base) / (real - base) of the means over subjects: the
    gap of a single subject can be near 0. The share is NaN if the mean gap is 0.
    """
    base_S, tuned_S, real_S = (torch.tensor(list(scores), dtype=torch.float64) for scores in (base, tuned, real))
    return Interval(*ratio(tuned_S - base_S, real_S - base_S, seed), len(base_S))


def spread(rows_ND: Tensor, prompt_N: Tensor) -> Tensor:
    """1 - cosine of every image with every other image of the same prompt, prompt by prompt."""
    groups = [within(rows_ND[prompt_N == number]).values for number in prompt_N.unique()]
    return 1 - torch.cat([torch.zeros(0, dtype=torch.float64), *groups])
