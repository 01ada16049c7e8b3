"""Colour profiles: measured on charts of known colours; sRGB keeps every bit."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from dbtrain.data.color import UNREAD, to_srgb
from dbtrain.data.images import open_photo
from tests.kit.made_photos import jpeg, picture, png

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
"""Chromaticities of Display P3's primaries; its white and its curve are sRGB's."""
REC709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
D65 = np.array([0.3127, 0.3290])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_xyz(primaries):
    """The matrix from linear RGB to XYZ under D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (*primaries, D65)]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


def matrix_profile(primaries, gamma=None) -> bytes:
    """An ICC profile of a display, made from its definition: primaries under D50, and sRGB's curve or a power."""
    white = BRADFORD @ to_xyz(REC709).sum(1)
    d50 = BRADFORD @ np.array([0.9642, 1.0, 0.8249])
    colorants = np.linalg.inv(BRADFORD) @ np.diag(d50 / white) @ BRADFORD @ to_xyz(primaries)
    fixed = lambda value: round(value * 65536).to_bytes(4, "big", signed=True)  # noqa: E731
    if gamma is None:
        curve = b"para\0\0\0\0\0\3\0\0" + b"".join(map(fixed, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    else:
        curve = b"para\0\0\0\0\0\0\0\0" + fixed(gamma)
    place = lambda xyz: b"XYZ \0\0\0\0" + b"".join(map(fixed, xyz))  # noqa: E731
    text = b"mluc\0\0\0\0\0\0\0\1\0\0\0\x0cenUS\0\0\0\4\0\0\0\x1cP\x003\0"[:28] + "P3".encode("utf-16-be")
    tags = {b"desc": text, b"wtpt": place((0.9642, 1, 0.8249)), b"cprt": text}
    tags |= {name: place(colorants[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, start = len(tags).to_bytes(4, "big"), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        padded = content + bytes(-len(content) % 4)
        table += name + (start + len(body)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        body += padded
    head = bytes(8) + b"\4\x30\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + place((0.9642, 1, 0.8249))[8:]
    whole = head.ljust(128, b"\0") + table + body
    return len(whole).to_bytes(4, "big") + whole[4:]


def chart() -> np.ndarray:
    """uint8 [1, n, 3]: colours that both gamuts hold."""
    steps = np.linspace(40, 215, 8).round()
    return np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(1, -1, 3).astype(np.uint8)


def linear(values):
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def curved(values):
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * np.clip(values, 0, None) ** (1 / 2.4) - 0.055)


def test_display_p3_becomes_srgb_as_its_definition_says():
    made = np.linalg.inv(to_xyz(REC709)) @ to_xyz(P3)
    wanted = curved(np.clip(linear(chart() / 255) @ made.T, 0, 1)) * 255
    content = png(Image.fromarray(chart().reshape(16, 32, 3)), icc_profile=matrix_profile(P3))
    got = np.asarray(open_photo(content)).reshape(1, -1, 3).astype(float)
    assert np.abs(got - wanted).max() <= 1.5
    assert np.abs(got - chart()).max() > 25
    np.testing.assert_array_equal(np.asarray(open_photo(content, srgb=False)).reshape(chart().shape), chart())


@pytest.mark.parametrize("profile", [SRGB, matrix_profile(REC709)])
@pytest.mark.parametrize("make", [png, jpeg])
def test_a_profile_that_means_srgb_keeps_every_bit(profile, make):
    plain, marked = open_photo(make(picture())), open_photo(make(picture(), icc_profile=profile))
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(marked))
    assert UNREAD not in marked.info


def test_another_curve_is_another_space():
    image = picture()
    image.info["icc_profile"] = matrix_profile(REC709, gamma=1.0)
    assert np.asarray(to_srgb(image)).mean() > np.asarray(image).mean() + 20


@pytest.mark.parametrize("profile", [b"none" * 40, matrix_profile(P3)[:150], b"\0" * 9_000_000])
def test_a_profile_that_cannot_be_used_leaves_the_values_and_says_so(profile):
    image = picture()
    image.info["icc_profile"] = profile
    assert to_srgb(image) is image and image.info[UNREAD]


def test_transparency_and_palettes_survive():
    image = picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(48) < 24, 0, 255).astype(np.uint8)[None].repeat(40, 0)))
    image.info["icc_profile"] = matrix_profile(P3)
    converted = to_srgb(image)
    assert converted.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(converted.getchannel("A")), np.asarray(image.getchannel("A")))
    flat = picture().quantize(64)
    flat.info["icc_profile"] = matrix_profile(P3)
    assert to_srgb(flat).mode == "RGB"


def test_grey_under_a_profile_for_colour_is_marked():
    image = Image.fromarray(np.asarray(picture())[..., 0])
    image.info["icc_profile"] = matrix_profile(P3)
    assert to_srgb(image) is image and image.info[UNREAD]
