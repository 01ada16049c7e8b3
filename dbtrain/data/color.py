"""Embedded colour profiles: a photo's values become sRGB, the space of base models' training data.

A photo without a profile, or with one that means sRGB, keeps every bit. There are dozens of sRGB profiles with
different bytes and names, so a profile is judged by what it does to a chart of colours.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE = 8 * 2**20
"""Largest profile that is looked at, in bytes; printers' profiles have 3 MiB."""
SAME = 2
"""Largest difference, in steps of 255, between a profile and sRGB that counts as none: what rounding makes."""
SIDES = 9
"""Steps of each channel in the chart."""
MODES = {"RGB": ("RGB", "RGBA", "P", "PA"), "L": ("L", "LA", "1"), "CMYK": ("CMYK",)}
"""Modes of images that a profile for a mode can be meant for."""
SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
UNREAD = "unread_profile"
"""Name in `Image.info` that marks a photo whose profile could not be used."""
ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError)


def to_srgb(image: Image.Image) -> Image.Image:
    """The image with its embedded profile applied; the same image where that changes nothing.

    Where the profile cannot be used, the values stay as they are, and `info[UNREAD]` is True.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    space, transform = _transform(profile)
    if space is None:
        image.info[UNREAD] = True
        return image
    if transform is None:
        return image
    if image.mode not in MODES[space]:
        image.info[UNREAD] = True  # such as colour under a profile for grey: one of the two is wrong
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    plain = image if image.mode == space else image.convert(space)
    converted = ImageCms.applyTransform(plain, transform)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _transform(profile: bytes) -> tuple[str | None, ImageCms.ImageCmsTransform | None]:
    """(the mode that a profile is for, what makes sRGB of it; None where it means sRGB). (None, None): unusable."""
    if len(profile) > MAX_PROFILE:
        return None, None
    return _made(profile)


@lru_cache(maxsize=16)
def _made(profile: bytes) -> tuple[str | None, ImageCms.ImageCmsTransform | None]:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = SPACES.get(source.profile.xcolor_space)
        if space is None:
            return None, None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            space,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        chart = _chart(space)
        if chart is not None:
            change = np.asarray(ImageCms.applyTransform(chart, transform), np.int16) - np.asarray(chart.convert("RGB"))
            if np.abs(change).max() <= SAME:
                return space, None
    except ERRORS:
        return None, None
    return space, transform


def _chart(space: str) -> Image.Image | None:
    """An image of every colour in even steps; None for inks, which are never sRGB."""
    steps = np.linspace(0, 255, SIDES).round().astype(np.uint8)
    if space == "RGB":
        grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1)
        return Image.fromarray(grid.reshape(SIDES, SIDES * SIDES, 3))
    return Image.fromarray(np.arange(256, dtype=np.uint8)[None]) if space == "L" else None
