"""Formats of pictures by their beginnings; the ones that are read, decoded under the limits of all photos."""

import io

import numpy as np
import pytest
from PIL import Image

from dbtrain.data.formats import START, picture_kind, readable
from dbtrain.data.images import open_photo
from dbtrain.errors import DataError
from tests.kit.made_photos import picture

FORMATS = [("JPEG", "JPEG"), ("PNG", "PNG"), ("WebP", "WEBP"), ("AVIF", "AVIF"), ("HEIC", "HEIF"),
           ("TIFF", "TIFF"), ("GIF", "GIF"), ("BMP", "BMP")]  # fmt: skip


def written(name, **options):
    if name in ("AVIF", "HEIF") and name not in readable().values():
        pytest.skip(f"{name} is not written here")
    out = io.BytesIO()
    smooth().save(out, name, **options)
    return out.getvalue()


def smooth():
    """A picture without fine blue detail, which these formats do not keep."""
    pixels = np.array(picture(480, 400))
    pixels[..., 2] = pixels[..., 0] // 2
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("kind", "name"), FORMATS)
def test_a_format_is_known_by_its_start(kind, name):
    assert picture_kind(written(name)[:START]) == kind


@pytest.mark.parametrize("start", [b"", b"\xff\xd8", b"%PDF-1.7", b"\0\0\0\x18ftypisom\0\0\0\0isom", b"RIFF0000WAVE"])
def test_other_files_are_no_picture(start):
    assert picture_kind(start) is None


@pytest.mark.parametrize("name", ["AVIF", "HEIF"])
def test_phones_formats_are_read_upright_and_refused_where_damaged_or_too_large(name):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = written(name, quality=95, exif=exif)
    # HEIC is turned by its own property; its EXIF must not turn it again.
    wanted = smooth() if name == "HEIF" else smooth().transpose(Image.Transpose.ROTATE_270)
    assert np.abs(np.asarray(open_photo(content)).astype(int) - np.asarray(wanted).astype(int)).mean() < 4
    with pytest.raises(DataError, match="the cap is 0.1 million"):
        open_photo(content, max_pixels=100_000)
    rng = np.random.default_rng(0)
    for number in range(40):
        damaged = bytearray(content[: len(content) if number % 2 else rng.integers(12, len(content))])
        damaged[rng.integers(len(damaged))] ^= 0xFF
        try:
            open_photo(bytes(damaged))
        except DataError as error:
            assert str(error).isprintable()  # noqa: PT017
