"""Masks as images and as factors of the loss."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from dbtrain.data.masks import factors, fitted, open_mask, used_samples
from dbtrain.errors import DataError
from dbtrain.settings.config import DataConfig
from tests.kit.made_photos import make_samples, mask_of, picture, png


def test_a_mask_is_what_is_bright_and_opaque():
    grey, alpha = mask_of(), mask_of(left=24)
    np.testing.assert_array_equal(np.asarray(open_mask(png(grey))), np.asarray(grey))
    white = Image.new("RGBA", grey.size, "white")
    white.putalpha(alpha)
    np.testing.assert_array_equal(np.asarray(open_mask(png(white))), np.asarray(alpha))
    both = Image.merge("LA", (grey, alpha))
    np.testing.assert_array_equal(np.asarray(open_mask(png(both))), np.minimum(grey, alpha))


@pytest.mark.parametrize("size", [(48, 40), (480, 400), (24, 20), (97, 81)])
def test_a_mask_is_brought_to_its_photos_size(size):
    got = np.asarray(fitted(mask_of(), size))
    assert got.shape == size[::-1] and got[:, : size[0] // 6].max() == 0 and got[:, size[0] // 3 :].min() == 255


@pytest.mark.parametrize("size", [(40, 48), (48, 48), (100, 40)])
def test_a_mask_of_another_shape_is_refused(size):
    with pytest.raises(DataError, match="has 48x40 pixels, its photo has"):
        fitted(mask_of(), size)


def test_a_cell_has_the_mean_of_its_pixels_factors():
    mask = np.zeros((16, 24), np.uint8)
    mask[:8, 10:] = 255
    mask[8, 0] = 51
    shares = torch.tensor([[0, 0.75, 1], [0.2 / 64, 0, 0]])
    assert factors(mask, 8, 0).shape == (1, 2, 3) and torch.equal(factors(mask, 8, 0)[0] > 0, shares > 0)
    torch.testing.assert_close(factors(mask, 8, 0)[0], shares)
    torch.testing.assert_close(factors(mask, 8, 0.1)[0], 0.1 + 0.9 * shares)
    assert factors(mask, 8, 0)[0, 0, 2] == 1, "exactly, for what is all subject"
    assert torch.equal(factors(mask, 1, 0)[0], torch.from_numpy(mask / np.float32(255)))


def masked(mask):
    return [dataclasses.replace(sample, mask=mask) for sample in make_samples(1, 2)]


def test_settings_say_which_masks_are_used():
    some = masked(png(mask_of()))
    assert used_samples(some, DataConfig(), "x") == some
    for off in ({"mask": False}, {"mask_floor": 1}, {"mask_floor": 1, "mask": True}):
        assert used_samples(some, DataConfig(**off), "x") == masked(None)
    with pytest.raises(DataError, match="x: sample cat-0-0-1 has no mask"):
        used_samples([some[0], *masked(None)[1:]], DataConfig(mask=True), "x")


def test_a_stored_mask_of_another_size_is_refused():
    with pytest.raises(DataError, match="x: sample cat-0-0-0: its mask has another size"):
        used_samples(masked(png(mask_of(40, 40))), DataConfig(), "x")
    with pytest.raises(DataError, match="no JPEG, PNG or WebP"):
        used_samples(masked(b"no picture"), DataConfig(), "x")
    assert picture().size == (48, 40)
