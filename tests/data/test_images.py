import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dbtrain.data import images
from dbtrain.errors import DataError
from tests.kit.made_photos import jpeg, picture, png

BASE = np.asarray(picture())
INVERSE = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}
"""EXIF orientation -> the Pillow transpose operation that makes the stored from the upright picture."""


def stored_turned(orientation):
    turned = picture()
    for operation in INVERSE[orientation]:
        turned = turned.transpose(Image.Transpose(operation))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return turned, exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_every_exif_orientation_gives_the_upright_picture(orientation, form):
    turned, exif = stored_turned(orientation)
    out = io.BytesIO()
    turned.save(out, form, exif=exif, **({"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0}))
    got = np.asarray(images.open_photo(out.getvalue())).astype(int)
    assert got.shape == BASE.shape
    # JPEG at quality 100 errs by rounding and by steep blue jumps; another orientation errs by tens on average.
    assert np.abs(got - BASE).mean() <= (2 if form == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_turned_photo_has_the_pixels_that_pillow_gives_it(orientation, mode):
    _, exif = stored_turned(orientation)
    content = jpeg(picture().convert(mode), exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(images.open_photo(content)), np.asarray(wanted))


def exif_of(*entries):
    """An EXIF block of (tag, type, count, the value's four bytes), the first thing of which is the byte order."""
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in sorted(entries))
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + b"\0\0\0\0"


ODD = {
    "XResolution as BYTE": (0x011A, 1, 1, b"\x48\0\0\0"),
    "ImageWidth as ASCII": (0x0100, 2, 3, b"48\0\0"),
    "ResolutionUnit below 0": (0x0128, 9, 1, struct.pack("<i", -2)),
    "StripOffsets as FLOAT": (0x0111, 11, 1, struct.pack("<f", 8.5)),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_tag_beside_the_orientation_spoils_no_photo(name):
    content = jpeg(picture(), exif=exif_of((0x0112, 3, 1, struct.pack("<HH", 6, 0)), ODD[name]))
    wanted = Image.open(io.BytesIO(content)).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(images.open_photo(content)), np.asarray(wanted))


@pytest.mark.parametrize(
    "kind, value",
    [(3, struct.pack("<HH", 0, 0)), (3, struct.pack("<HH", 9, 0)), (2, b"6\0\0\0"), (11, struct.pack("<f", 6.5))],
)
def test_an_orientation_that_is_none_leaves_the_photo_as_it_is(kind, value):
    content = jpeg(picture(), exif=exif_of((0x0112, kind, 1, value)))
    np.testing.assert_array_equal(np.asarray(images.open_photo(content)), np.asarray(Image.open(io.BytesIO(content))))


def grey():
    return BASE[..., 0]


def sixteen_bit():
    return Image.fromarray((grey().astype(np.uint16) << 8) + 77)


def palette():
    image = Image.fromarray((grey() // 64).astype(np.uint8), "L").convert("P")
    image.putdata((grey() // 64).ravel().tolist())
    image.putpalette([10, 20, 30, 50, 60, 70, 90, 100, 110, 200, 210, 220])
    return image


def palette_colours(transparent=None):
    colours = np.array([[10, 20, 30], [50, 60, 70], [90, 100, 110], [200, 210, 220]])
    if transparent is not None:
        colours[transparent] = 255
    return colours[grey() // 64]


def with_alpha(mode):
    alpha = Image.fromarray(np.where(grey() < 128, 0, 255).astype(np.uint8))
    image = picture().convert(mode)
    image.putalpha(alpha)
    return image


def over_white(rgb):
    return np.where(grey()[..., None] < 128, 255, np.broadcast_to(rgb, BASE.shape))


THREE_GREY = np.repeat(grey()[..., None], 3, 2)
EXACT = {
    "rgb": (png(picture()), BASE),
    "16-bit grey": (png(sixteen_bit()), THREE_GREY),
    "16-bit grey, transparent level": (png(sixteen_bit(), transparency=77), np.where(THREE_GREY == 0, 255, THREE_GREY)),
    "palette": (png(palette()), palette_colours()),
    "palette with transparency": (png(palette(), transparency=2), palette_colours(2)),
    "grey": (png(Image.fromarray(grey())), THREE_GREY),
    "black and white": (png(Image.fromarray(grey() > 100)), np.where(THREE_GREY > 100, 255, 0)),
    "grey and alpha": (png(with_alpha("L")), over_white(np.asarray(picture().convert("L"))[..., None])),
    "rgb and alpha": (png(with_alpha("RGB")), over_white(BASE)),
    "rgb, transparent colour": (
        png(picture(), transparency=tuple(int(v) for v in BASE[3, 4])),
        np.where((BASE[3, 4] == BASE).all(-1, keepdims=True), 255, BASE),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_every_png_kind_gives_these_pixels(name):
    content, want = EXACT[name]
    np.testing.assert_array_equal(np.asarray(images.open_photo(content)), want)


def test_cmyk_jpeg_keeps_its_colours():
    content = jpeg(picture(96, 80).convert("CMYK"))
    got = np.asarray(images.open_photo(content)).astype(int)
    assert np.abs(got - np.asarray(picture(96, 80))).mean() < 4  # inverted CMYK would err by about 128


def test_main_picture_of_a_multi_picture_jpeg_is_used():
    out = io.BytesIO()
    picture().save(out, "MPO", save_all=True, append_images=[picture(seed=9)], quality=95)
    assert Image.open(io.BytesIO(out.getvalue())).n_frames == 2
    np.testing.assert_array_equal(np.asarray(images.open_photo(out.getvalue())), np.asarray(Image.open(out)))


def bomb(width, height):
    """A PNG of a few bytes whose header claims a size."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def animated(form):
    out = io.BytesIO()
    picture().save(out, form, save_all=True, append_images=[picture(seed=9)])
    return out.getvalue()


def saved(form):
    out = io.BytesIO()
    picture().save(out, form)
    return out.getvalue()


BAD = {
    "empty": (b"", "is empty"),
    "truncated jpeg": (jpeg(picture(200, 200))[:-900], "is damaged or cut short"),
    "truncated png": (png(picture(200, 200))[:-900], "is damaged or cut short"),
    "flipped png": (png(picture()).replace(b"IDAT", b"IDAU"), "is damaged or cut short"),
    "renamed bmp": (saved("BMP"), "is no JPEG, PNG or WebP photo"),
    "renamed gif": (saved("GIF"), "is no JPEG, PNG or WebP photo"),
    "renamed tiff": (saved("TIFF"), "is no JPEG, PNG or WebP photo"),
    "text": (b"hello\nworld", "is no JPEG, PNG or WebP photo"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no JPEG, PNG or WebP photo"),
    "animated png": (animated("PNG"), "is an animation of 2 frames"),
    "animated webp": (animated("WEBP"), "is an animation of 2 frames"),
    "bomb": (bomb(20_000, 20_000), "pixels"),
    "240 megapixels": (bomb(20_000, 12_000), "has 20000x12000 pixels, the cap is 200 million"),
    "tiny": (png(picture(15, 40)), "the short side needs 16"),
    "ribbon": (png(picture(400, 20)), "longer than 10:1"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("error")
def test_bad_photos_end_in_one_line_naming_file_defect_and_remedy(tmp_path, name):
    content, part = BAD[name]
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        images.open_photo(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert part in line
    assert "; " in line
    assert line.isprintable()


def test_only_readable_regular_files_of_bounded_size_are_opened(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        images.open_photo(tmp_path / "none.png")
    with pytest.raises(DataError, match="not a regular file|cannot be read"):
        images.open_photo(tmp_path)
    with pytest.raises(DataError, match="not a regular file"):
        images.read_photo("/dev/zero")
    (tmp_path / "big.png").write_bytes(png(picture()))
    with pytest.raises(DataError, match="MiB"):
        images.open_photo(tmp_path / "big.png", max_bytes=100)
    with pytest.raises(DataError, match="MiB"):
        images.open_photo(png(picture()), max_bytes=100)
    with pytest.raises(DataError, match="cap is 0.001 million"):
        images.open_photo(png(picture()), max_pixels=1000)


def test_flipped_bytes_never_escape_as_other_exceptions():
    rng = np.random.default_rng(0)
    for content in (jpeg(picture()), png(picture()), animated("WEBP"), EXACT["palette with transparency"][0]):
        for _ in range(150):
            damaged = bytearray(content)
            damaged[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            with suppress(DataError):
                images.open_photo(bytes(damaged))


def test_square_resizes_the_short_side_and_crops_where_asked():
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, :, 0] = np.arange(100)
    wide = Image.fromarray(wide)
    assert images.square(wide, 40, (0, 0))[0, :, 0].tolist() == list(range(40))
    assert images.square(wide, 40)[0, :, 0].tolist() == list(range(30, 70))
    assert images.square(wide, 40, (0, 1))[0, :, 0].tolist() == list(range(60, 100))
    assert images.square(wide, 16).shape == (16, 16, 3)
    assert images.square(wide.rotate(90, expand=True), 80).shape == (80, 80, 3)


def test_crop_positions_are_equally_likely():
    wide = Image.fromarray(np.tile(np.arange(20, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    lefts = [images.square(wide, 16, (0.5, (i + 0.5) / 1000))[0, 0, 0] for i in range(1000)]
    assert np.bincount(lefts).tolist() == [200] * 5


def test_reducing_is_antialiased():
    """A checkerboard of single pixels becomes even grey; nearest or plain bilinear sampling would leave a pattern."""
    board = np.indices((160, 160)).sum(0) % 2 * 255
    small = images.square(Image.fromarray(np.repeat(board[..., None], 3, 2).astype(np.uint8)), 20).astype(int)
    assert np.abs(small - 127.5).max() < 8


@pytest.mark.parametrize("size", [(640, 480), (479, 641), (1000, 101), (40, 48), (64, 64)])
@pytest.mark.parametrize("crop", [(0.5, 0.5), (0.1, 0.9)])
def test_a_stored_photo_gives_the_same_pixels(size, crop):
    photo = picture(*size)
    content, extension = images.encode(images.shorten(photo, 64))
    assert extension == "png"
    np.testing.assert_array_equal(images.square(images.open_photo(content), 64, crop), images.square(photo, 64, crop))


def test_pixels_and_flip():
    array = np.zeros((4, 4, 3), np.uint8)
    array[0, 1] = (255, 0, 51)
    pixels = images.to_pixels(array)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 4, 4)
    torch.testing.assert_close(pixels[:, 0, 1], torch.tensor([1, -1, -0.6]))
    assert images.flip(array)[0, 2].tolist() == [255, 0, 51]
    np.testing.assert_array_equal(images.flip(images.flip(array)), array)


def test_stored_png_carries_nothing_but_pixels():
    image = images.open_photo(jpeg(picture(), exif=stored_turned(6)[1], icc_profile=b"secret" * 40, comment=b"secret"))
    assert Image.open(io.BytesIO(images.encode(image)[0])).info == {}
