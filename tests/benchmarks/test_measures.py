"""The benchmarks' own measures against plain arithmetic."""

import math

import pytest
import torch

from benchmarks.measures import choose, closed_share, mean_interval, spread, zero_shot
from dbtrain.evaluate.features import load_pair
from tests.kit.main_job import photo


def test_choice_is_among_a_pictures_own_texts():
    pair = load_pair()
    images = [photo(seed, 64, 64) for seed in range(3)]
    options = [["a dog", "a cat", "a car"], ["a cat", "a bus", "a dog"], ["a dog", "a dog", "a fish"]]
    want = []
    for image, texts in zip(images, options, strict=True):
        cosines = [float(pair.images([image])[0] @ pair.texts([text])[0]) for text in texts]
        want.append(cosines.index(max(cosines)))
    assert choose(pair, images, options).tolist() == want
    assert zero_shot(pair, images, options, want).tolist() == [1, 1, 1]
    assert zero_shot(pair, images, options, [(k + 1) % 2 if k < 2 else 0 for k in want]).tolist() == [0, 0, 0]


def test_the_mean_of_one_value_a_subject():
    found = mean_interval([1.0, math.nan, 3.0])
    assert (found.value, found.low, found.high, found.count) == (2.0, 1.0, 3.0, 2)


def test_closed_share_is_of_the_means():
    found = closed_share([0.2, 0.4], [0.5, 0.7], [0.6, 1.0])
    assert found.value == pytest.approx((0.6 - 0.3) / (0.8 - 0.3))
    assert closed_share([0.2], [0.2], [0.9]).value == 0
    assert closed_share([0.2], [0.9], [0.9]).value == pytest.approx(1)
    assert math.isnan(closed_share([0.2], [0.5], [0.2]).value)
    # Half of the resamples hold one subject only, and those of the first have no gap; they say nothing.
    found = closed_share([0.0, 0.5], [0.2, 0.6], [0.0, 1.0])
    assert found.value == pytest.approx(0.6) and found.low == pytest.approx(0.2) and found.high == pytest.approx(0.6)


def test_spread_compares_images_of_one_prompt_only():
    a, b = torch.eye(2)
    found = spread(torch.stack([a, b, a, b]), torch.tensor([0, 1, 0, 1]))
    assert found.tolist() == pytest.approx([0] * 4, abs=1e-12)  # float64
    assert spread(torch.stack([a, b]), torch.tensor([0, 1])).numel() == 0
