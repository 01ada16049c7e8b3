"""Shapes of photos: cameras' photos keep what they show, memory stays what a square needs."""

import numpy as np
import pytest
from PIL import Image

from dbtrain.data.buckets import bucket_shapes, covering, lost, shape_of
from dbtrain.data.images import fit, square
from dbtrain.settings.config import DataConfig

CAMERAS = [
    (3000, 4000),
    (4032, 3024),
    (4000, 6000),
    (6000, 4000),
    (2160, 3840),
    (3840, 2160),
    (2000, 2000),
    (1200, 1500),
]


def data(resolution: int, buckets: bool = True) -> DataConfig:
    return DataConfig(resolution=resolution, buckets=buckets)


@pytest.mark.parametrize(("resolution", "multiple"), [(256, 8), (512, 8), (512, 16), (768, 16), (1024, 8), (1024, 16)])
def test_photos_of_cameras_lose_next_to_nothing(resolution, multiple):
    for size in CAMERAS:
        assert lost(size, shape_of(size, data(resolution), multiple)) < 0.02, size
        assert lost(size, shape_of(size, data(resolution, False), multiple)) == pytest.approx(1 - min(size) / max(size))


@pytest.mark.parametrize(
    ("resolution", "multiple"), [(16, 8), (32, 8), (64, 8), (96, 16), (512, 8), (1024, 16), (2048, 8)]
)
def test_shapes_are_few_fit_the_square_memory_and_turn_with_their_photo(resolution, multiple):
    shapes = bucket_shapes(resolution, multiple)
    assert shapes[0] == (resolution, resolution) and len(shapes) <= 11
    for height, width in shapes:
        assert height % multiple == width % multiple == 0 and max(height, width) <= 2 * min(height, width)
        assert 0.9 * resolution**2 <= height * width <= resolution**2 and (width, height) in shapes


def test_a_photo_longer_than_every_shape_gets_the_longest_and_never_less_than_it_needs():
    """Shards hold a photo with its short side at the resolution; that covers each shape without enlarging."""
    for wide in range(100, 1001, 7):
        shape = shape_of((wide, 100), data(512))
        stored = covering((wide, 100), (512, 512))
        across, down = covering(stored, shape)
        assert across <= stored[0] and down <= stored[1] and (down >= shape[0], across >= shape[1]) == (True, True)
    assert shape_of((1000, 100), data(512)) == (360, 720)


def test_covering_is_the_smallest_size_that_covers():
    for size in [(48, 40), (40, 48), (1000, 333), (17, 170), (33, 33)]:
        for shape in [(32, 32), (40, 24), (24, 40)]:
            across, down = covering(size, shape)
            assert (across == shape[1] and down >= shape[0]) or (down == shape[0] and across >= shape[1])
            assert across / down == pytest.approx(size[0] / size[1], rel=1 / min(shape))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_fit_shows_the_middle_and_the_ends_of_a_photo(shape):
    """A ramp in each axis: what a crop shows is read off the pixels, by an oracle that resizes nothing."""
    rows, columns = np.mgrid[0:120, 0:90]
    photo = Image.fromarray(np.stack([rows * 2, columns * 2, 0 * rows], 2).astype(np.uint8))
    for crop in [(0.5, 0.5), (0, 0), (1, 1)]:
        pixels = fit(photo, shape, crop)
        assert pixels.shape == (*shape, 3)
        factor = max(shape[0] / 120, shape[1] / 90)
        for axis, channel, side in ((0, 0, 120), (1, 1, 90)):
            seen = pixels[..., channel].mean(1 - axis) / 2
            spare = side - shape[axis] / factor
            first = spare * crop[axis] + 0.5 / factor - 0.5
            assert seen[2] == pytest.approx(first + 2 / factor, abs=1.5)
            assert seen[-3] == pytest.approx(first + (shape[axis] - 3) / factor, abs=1.5)


def test_a_square_is_what_it_was():
    """The size of a square's photo, by the plain formula from before there were other shapes."""
    for width, height in [(640, 480), (480, 641), (513, 512), (99, 1000), (1001, 777)]:
        short = min(width, height)
        want = tuple(max(512, round(side * 512 / short)) for side in (width, height))
        assert covering((width, height), (512, 512)) == want
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    np.testing.assert_array_equal(square(photo, 32), np.asarray(photo.resize((45, 32), 1).crop((7, 0, 39, 32))))
