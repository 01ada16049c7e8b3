"""Photos as pixels: opened safely, turned upright, made RGB, resized and cropped.

Decisions, each of which a test holds:
- JPEG, PNG, WebP, AVIF and, with the extra `photos`, HEIC; known by content and never by name. Animations are
  refused, since no frame is obviously meant. Of a multi-picture JPEG or HEIC (depth or gain maps, bursts from phones)
  the main picture is used.
- The size in pixels is checked in the header, before anything is decoded.
- Transparency is laid over white. 16-bit samples keep their upper 8 bits. CMYK without a profile is converted by
  Pillow's plain formula.
- Embedded colour profiles are applied (`color.py`); values without one are sRGB, as base models' training data were.
"""

import io
import os
import stat
import struct
import threading
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dbtrain.data.buckets import Shape, covering, offset
from dbtrain.data.color import to_srgb
from dbtrain.data.formats import START, missing, picture_kind, readable
from dbtrain.errors import DataError, shown

if TYPE_CHECKING:
    from torch import Tensor

MANY = ("MPO", "HEIF")
"""Pillow's names of formats that can hold other pictures beside the main one, which comes first."""
MAX_PIXELS = 200_000_000
"""Most pixels of a photo: phones take up to 16320x12240. `data.max_pixels` replaces it."""
MAX_BYTES = 128 * 2**20
MIN_SIDE = 16
"""Shortest side of a usable photo, in pixels."""
MAX_ASPECT = 10
"""Greatest ratio of long to short side: beyond it, a square crop shows next to nothing of the photo."""
PNG_LEVEL = 1
"""zlib level of stored samples: 6 is 2-3 times slower for 5-9 % fewer bytes."""
DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged files, depending on where the damage is; each of them means a bad photo."""

ORIENTATION = 0x0112
"""The EXIF tag that says how a photo was held."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a photo upright, by its orientation; with 1, or what is no number from 1 to 8, it stays as it is."""

_header_lock = threading.Lock()


def open_photo(
    source: Path | bytes, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, srgb: bool = True
) -> Image.Image:
    """An upright RGB image from a file or its bytes; a DataError names the file, the defect and the remedy.

    srgb: apply the embedded colour profile.
    """
    return open_with_alpha(source, max_pixels, max_bytes, srgb)[0]


def open_with_alpha(
    source: Path | bytes, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, srgb: bool = True
) -> tuple[Image.Image, Image.Image | None]:
    """(the image of `open_photo`, its opacity as a grey image; None where all of it is opaque)."""
    content = source if isinstance(source, bytes) else read_photo(source, max_bytes)
    name = "photo" if isinstance(source, bytes) else str(source)
    if len(content) > max_bytes:
        raise DataError(_too_many_bytes(name, len(content), max_bytes))
    try:
        with _header(content) as image:
            problem = _header_problem(image, max_pixels)
            if problem is None:
                image.load()
                image = _upright(image)
                return _to_rgb(image, srgb), _alpha(image)
    except DECODE_ERRORS as error:
        problem = _decode_problem(error, content, max_pixels)
    raise DataError(f"{name}: {problem}")


def may_be_transparent(content: bytes) -> bool:
    """Whether a picture's header speaks of transparency; False for what is no picture."""
    try:
        with _header(content) as image:
            return image.has_transparency_data
    except DECODE_ERRORS:
        return False


def picture_size(content: bytes) -> tuple[int, int]:
    """(width, height) in pixels, by a picture's header; DataError if it has none."""
    try:
        with _header(content) as image:
            return image.size
    except DECODE_ERRORS as error:
        raise DataError(f"photo: {_decode_problem(error, content, MAX_PIXELS)}") from error


def read_photo(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """A photo file's bytes; DataError if it is missing, unreadable, no regular file, empty or above `max_bytes`."""
    try:
        # Non-blocking, so that a pipe under a photo's name is refused instead of waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path}: is not a regular file; give a JPEG, PNG or WebP file")
            if status.st_size > max_bytes:
                raise DataError(_too_many_bytes(path, status.st_size, max_bytes))
            content = file.read(status.st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if not content:
        raise DataError(f"{path}: is empty (0 bytes); copy the photo again or take it out")
    return content


def shorten(image: Image.Image, resolution: int) -> Image.Image:
    """The image with its short side reduced to `resolution` pixels; unchanged if that is not larger. Aspect is kept."""
    square_of = (resolution, resolution)
    return image if min(image.size) <= resolution else _resized(image, covering(image.size, square_of))


def square(image: Image.Image, resolution: int, crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """`fit` for a square shape. The photo and what `shorten` made of it give the same result."""
    return fit(image, (resolution, resolution), crop)


def fit(image: Image.Image, shape: Shape, crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """uint8 [height, width, 3] of a shape (height, width): resized to just cover it (Lanczos), then cropped. Grey
    images, which are masks, are resized linearly and have no third dimension.

    `crop` places the shape within the spare room, (from the top, from the left), each in [0, 1]; uniform numbers make
    every position equally likely.
    """
    height, width = shape
    image = _resized(image, covering(image.size, shape))
    top, left = offset(image.height - height, crop[0]), offset(image.width - width, crop[1])
    return np.asarray(image.crop((left, top, left + width, top + height)))


def flip(array: np.ndarray) -> np.ndarray:
    """The HWC image mirrored left-right, contiguous."""
    return np.ascontiguousarray(array[:, ::-1])


def to_pixels(array: np.ndarray) -> "Tensor":
    """float32 [C, H, W] in [-1, 1] from uint8 [H, W, C]."""
    import torch  # here, so that preflight and sharding do not wait two seconds for it

    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)).astype(np.float32) / 127.5 - 1)


def encode(image: Image.Image) -> tuple[bytes, str]:
    """(file bytes, extension) of an image as it is stored: PNG, so that the very same pixels come out again."""
    return _png(image.convert("RGB")), "png"


def encode_grey(image: Image.Image) -> bytes:
    """The file bytes of a grey image as it is stored: PNG."""
    return _png(image.convert("L"))


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    # A new image, so that no metadata comes along.
    Image.fromarray(np.asarray(image)).save(out, "PNG", compress_level=PNG_LEVEL)
    return out.getvalue()


def _header(content: bytes) -> Image.Image:
    """The lazily opened image. Pillow's own cap is off meanwhile, because `_header_problem` checks the size."""
    with _header_lock:
        cap, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(content), formats=list(readable().values()))
        finally:
            Image.MAX_IMAGE_PIXELS = cap


def _header_problem(image: Image.Image, max_pixels: int) -> str | None:
    """What makes a photo unusable though its header is sound; None if nothing does."""
    width, height = image.size
    size = f"has {width}x{height} pixels"
    if width * height > max_pixels:
        return f"{size}, the cap is {max_pixels / 1e6:g} million; reduce the photo, or raise data.max_pixels"
    if getattr(image, "is_animated", False) and image.format not in MANY:
        return f"is an animation of {getattr(image, 'n_frames', 1)} frames; save the frame you mean as a still photo"
    if min(width, height) < MIN_SIDE:
        return f"{size}, the short side needs {MIN_SIDE}; use a larger photo"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{size}, longer than {MAX_ASPECT}:1; crop the photo to the subject"
    return None


def _decode_problem(error: Exception, content: bytes, max_pixels: int) -> str:
    """The defect and remedy for a file that Pillow could not decode."""
    if isinstance(error, Image.DecompressionBombError):
        return f"has far more than {max_pixels / 1e6:g} million pixels; reduce the photo"
    kind = picture_kind(content[:START])
    if isinstance(error, Image.UnidentifiedImageError) and kind not in readable():
        what = f"is no JPEG, PNG or WebP photo{f' but {kind}' if kind else ''}, whatever its name says"
        return f"{what} (it begins with {shown(content[:8])}); {missing(kind)}"
    # Pillow names the object in memory, which says nothing and differs from run to run.
    why = "not even its header can be read" if isinstance(error, Image.UnidentifiedImageError) else shown(str(error))
    return f"is damaged or cut short ({why}); copy the photo again or take it out"


def _too_many_bytes(name: object, size: int, max_bytes: int) -> str:
    return f"{name}: has {size / 2**20:.1f} MiB, the cap is {max_bytes / 2**20:.1f} MiB; reduce the photo"


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, whatever else its EXIF holds.

    Pillow's `exif_transpose` also writes all EXIF anew, which fails for tags of types that it did not expect.
    """
    turn = TURNS.get(image.getexif().get(ORIENTATION))
    return image if turn is None else image.transpose(turn)


def _alpha(image: Image.Image) -> Image.Image | None:
    """The image's opacity as a grey image; None where all of it is opaque."""
    if not image.has_transparency_data:
        return None
    image = _grey_from_16_bit(image) if image.mode.startswith("I") else image
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha


def _to_rgb(image: Image.Image, srgb: bool = True) -> Image.Image:
    """The image as 8-bit RGB, over white where it is transparent. srgb: apply its colour profile."""
    if image.mode.startswith("I"):
        image = _grey_from_16_bit(image)
    if srgb:
        image = to_srgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    """8-bit grey from 16-bit grey, with alpha where a transparent grey level is set (Pillow itself would clip)."""
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    level = image.info.get("transparency")
    if level is not None:
        grey.putalpha(Image.fromarray(np.where(values == level, 0, 255).astype(np.uint8)))
    return grey


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in (width, height); the image itself if it has that size."""
    # Lanczos rings at edges, and a mask that rings has weight where the subject is not.
    how = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS
    return image if image.size == size else image.resize(size, how)
