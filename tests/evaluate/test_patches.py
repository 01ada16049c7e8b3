"""The patch distance against plain loops, and what it is for: seeing where things are."""

import numpy as np
import pytest
import torch
from PIL import Image

from dbtrain.evaluate.features import load_identity, load_pair
from dbtrain.evaluate.patches import patch_distances


def picture(left: int, top: int) -> Image.Image:
    """A red square on green."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 1] = 160
    pixels[top : top + 24, left : left + 24] = (220, 20, 20)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("load", [load_identity, load_pair])
def test_the_distance_is_the_formula(load):
    encoder, images = load(), [picture(4, 4), picture(30, 20), picture(36, 36)]
    vision = getattr(encoder.model, "vision_model", encoder.model)
    wanted = []
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        hidden = [vision(pixel_values=encoder.preprocess([images[k]]), output_hidden_states=True).hidden_states
                  for k in (i, j)]
        terms = []
        for first, second in zip(*hidden):
            for a, b in zip(first[0, 1:].double(), second[0, 1:].double()):  # row 0 is [CLS], which has no place
                terms.append(((a / a.norm() - b / b.norm()) ** 2).sum().item() / 2)
        wanted.append(np.mean(terms))
    # Alone and in a batch, fp32 features may differ in the last bits: 2^-24 times some layers' growth.
    assert patch_distances(encoder, images).tolist() == pytest.approx(wanted, abs=1e-5)


def test_equal_pictures_have_no_distance_and_a_moved_thing_has_more_than_in_the_cls_feature():
    encoder = load_identity()
    assert patch_distances(encoder, [picture(4, 4), picture(4, 4)]).abs().max() < 1e-6
    moved = [picture(4, 4), picture(36, 36)]
    first, second = encoder.images(moved)
    assert patch_distances(encoder, moved).item() > 2 * (1 - first @ second).item()


def test_fewer_than_two_pictures_have_no_pairs():
    encoder = load_identity()
    assert patch_distances(encoder, [picture(0, 0)]).shape == torch.Size([0])
