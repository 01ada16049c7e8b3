"""Masks: which part of a photo shows the subject. A mask is a grey image of its photo's size, white is the subject.

Values between black and white are shares. A mask goes with its photo through every resize, crop and mirror.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops

from dbtrain.data.images import open_with_alpha, picture_size
from dbtrain.errors import DataError
from dbtrain.settings.config import DataConfig
from dbtrain.values import Sample

if TYPE_CHECKING:
    from torch import Tensor

MARKED = 128
"""A mask must have a pixel of at least this grey level. Noise of a JPEG or of scissors' edges stays below."""
EMPTY = "marks nothing that is trained; paint the subject white"


def open_mask(source: Path | bytes) -> Image.Image:
    """A mask's grey image from a file or its bytes. What is transparent in it is black."""
    # A mask's values are shares, not colours.
    image, alpha = open_with_alpha(source, srgb=False)
    grey = image.convert("L")
    # `open_photo` laid the picture over white: c a + 255 (1 - a). Over black it is c a.
    return grey if alpha is None else ImageChops.subtract(grey, ImageChops.invert(alpha))


def fitted(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The mask in its photo's (width, height). DataError if it has another shape."""
    (width, height), (wide, high) = mask.size, size
    # A program that reduces a photo rounds its sides, each by less than a pixel.
    if abs(width * high - height * wide) > max(wide, high):
        what = f"has {width}x{height} pixels, its photo has {wide}x{high}"
        raise DataError(f"{what}; save the mask in the photo's shape, turned as the photo is shown")
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def used_samples(samples: Iterable[Sample], data: DataConfig, directory: Path | str) -> list[Sample]:
    """A subject's stored photos with the masks that the settings use. DataError for a mask that does not fit, or that
    is missing where `data.mask` is true."""
    found = [sample if data.weighs else replace(sample, mask=None) for sample in samples]
    for sample in found:
        if data.mask is True and data.weighs and sample.mask is None:
            what = f"{directory}: sample {sample.key} has no mask, data.mask is true"
            raise DataError(f"{what}; make the shards with masks, or set data.mask=auto")
        if sample.mask is not None and picture_size(sample.mask) != picture_size(sample.image):
            what = f"{directory}: sample {sample.key}: its mask has another size than its photo"
            raise DataError(f"{what}; make the shards anew")
    return found


def factors(mask_HW: np.ndarray, cell: int, floor: float) -> "Tensor":
    """float32 [1, h, w]: the loss's factor of each latent cell of `cell` pixels a side, from uint8 [H, W].

    A cell has the mean of its pixels' factors, floor + (1 - floor) * mask.
    """
    import torch  # here, so that preflight and sharding do not wait two seconds for it

    mask = torch.from_numpy(np.array(mask_HW, dtype=np.float32))[None, None] / 255
    share = torch.nn.functional.avg_pool2d(mask, cell)[0]
    return floor + (1 - floor) * share
