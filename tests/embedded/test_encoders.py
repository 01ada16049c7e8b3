"""The encoders' contrastive losses and augmentation."""

import math

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from dbtrain.tiny import BASE
from dbtrain_embedded import encoders, pool


def test_identity_loss_counts_the_views_of_one_individual_as_partners():
    class Echo(torch.nn.Module):
        def forward(self, pixel_values):
            state = pixel_values.flatten(1)[:, None]
            return type("Out", (), {"last_hidden_state": state})

    views = torch.eye(6).reshape(6, 1, 2, 3)
    loss, hits = encoders.identity_loss(Echo(), views, views, temperature=0.1)
    assert float(hits) == 1 and float(loss) == pytest.approx(math.log(1 + 5 * math.exp(-10)), abs=1e-6)
    assert float(encoders.identity_loss(Echo(), views, views.roll(1, 0))[1]) == 0


def test_augment_keeps_shape_and_is_seeded():
    pixels = pool.to_tensor(pool.held_out(4)[0])
    first = encoders.augment(pixels, np.random.default_rng(1))
    assert first.shape == pixels.shape
    assert torch.equal(first, encoders.augment(pixels, np.random.default_rng(1)))
    assert not torch.equal(first, encoders.augment(pixels, np.random.default_rng(2)))


def test_clip_loss_counts_equal_captions_as_right_for_each_other():
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    tokens = tokenizer(["a photo of a dog"] * 4, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        loss, hits = encoders.clip_loss(encoders.build_clip(tokenizer), tokens, pool.to_tensor(pool.held_out(4)[0]))
    # The four text states are equal, so each picture's probabilities are 1/4; the other direction is at least ln 4.
    assert float(hits) == 1 and float(loss) >= math.log(4) - 1e-5
