"""Sharpness and likeness: what they grow and shrink with, and what they must not depend on."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from dbtrain.data.appearance import ALIKE, BLURRED, JUDGED, alike, sharpness, tiny_picture
from dbtrain.tiny import DEMO
from tests.kit.made_photos import picture

REAL = [Image.open(path).convert("RGB") for path in sorted((DEMO.parent / "real-dog").glob("*.jpg"))]


def plain_sharpness(grey: np.ndarray) -> float:
    """The variance of the Laplacian by its definition, over that of the picture."""
    rows, columns = grey.shape
    found = [
        4 * int(grey[y, x]) - int(grey[y - 1, x]) - int(grey[y + 1, x]) - int(grey[y, x - 1]) - int(grey[y, x + 1])
        for y in range(1, rows - 1)
        for x in range(1, columns - 1)
    ]
    return float(np.var(found) / np.var(grey))


def test_sharpness_is_the_relative_variance_of_the_laplacian_of_the_middle():
    grey = np.random.default_rng(0).integers(0, 255, (128, 140), dtype=np.uint8)
    image = Image.fromarray(grey).convert("RGB")
    assert sharpness(image, 512) == pytest.approx(plain_sharpness(grey[19:109, 21:119]), rel=1e-5)
    edges = image.copy()
    edges.paste((0, 0, 0), (0, 0, 140, 19))
    assert sharpness(edges, 512) == sharpness(image, 512)


@pytest.mark.parametrize("photo", REAL[:3])
def test_blur_shows_at_the_size_of_training_whatever_the_light(photo):
    photo = photo.crop((10, 10, 150, 150))
    sharp = sharpness(photo, 128)
    blurs = [sharpness(photo.filter(ImageFilter.GaussianBlur(radius)), 128) for radius in (0.5, 1, 2, 4)]
    assert [sharp, *blurs] == sorted([sharp, *blurs], reverse=True)
    assert sharp > 2 * BLURRED and blurs[3] < BLURRED
    assert sharpness(ImageEnhance.Brightness(photo).enhance(0.6), 128) == pytest.approx(sharp, rel=0.1)


def test_small_photos_small_trainings_and_flat_pictures_are_not_judged():
    assert sharpness(picture(JUDGED[0] - 1, 300), 512) is None and sharpness(picture(300, 300), JUDGED[0] - 8) is None
    assert sharpness(Image.new("RGB", (300, 300), "red"), 512) is None


@pytest.mark.parametrize("photo", REAL[:3])
def test_the_same_photo_saved_again_is_alike(photo):
    saved = io.BytesIO()
    photo.resize((90, 90)).save(saved, "JPEG", quality=40)
    versions = [photo, Image.open(saved), photo.resize((200, 200)), ImageEnhance.Color(photo).enhance(0.9)]
    found = alike([tiny_picture(version.convert("RGB")) for version in versions])
    assert [pair[:2] for pair in found] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert all(ALIKE <= likeness <= 1.0001 for *_, likeness in found)


def test_other_photos_of_a_subject_mirror_images_and_flat_pictures_are_not_alike():
    photos = [*REAL, REAL[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    flat = [Image.new("RGB", (50, 50), colour) for colour in ("white", "white")]
    assert alike([tiny_picture(photo) for photo in (*photos, *flat)]) == []
