"""Aspect buckets: the few shapes that photos are trained in, so that a portrait keeps its height.

A shape is (height, width) in pixels. All shapes have about `data.resolution`^2 pixels. Their ratios are those of
cameras and phones, so that such photos lose next to nothing, and there are few shapes to encode class images in.
"""

import math
from functools import cache

from dbtrain.settings.config import DataConfig

Shape = tuple[int, int]

RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)
"""Long side by short side. Longer photos are cropped to the last one."""
LEAST = 0.9
"""A shape has at least this share of the pixels of the square, and never more: what fits memory for one fits for all.
"""


@cache
def bucket_shapes(resolution: int, multiple: int = 8) -> tuple[Shape, ...]:
    """The shapes of a resolution, with sides that divide by `multiple`; the square comes first.

    For each ratio the shape that is nearest to it, and of equals the largest.
    """
    cells = resolution // multiple
    sides = range(1, 2 * cells + 1)
    sizes = [(h, w) for h in sides for w in sides if h <= 2 * w and w <= 2 * h and LEAST <= h * w / cells**2 <= 1]
    ratios = [ratio**sign for ratio in RATIOS for sign in (1, -1)]
    nearest = [min(sizes, key=lambda size: (_apart(size, (ratio, 1)), -size[0] * size[1])) for ratio in ratios]
    return tuple((h * multiple, w * multiple) for h, w in dict.fromkeys(nearest))


def shape_of(size: tuple[int, int], data: DataConfig, multiple: int = 8) -> Shape:
    """The shape in which a photo of (width, height) pixels is trained: the bucket nearest in the logarithm of the
    ratio; always the square without `data.buckets`.

    multiple: what the family's sides must divide by (`Codec.multiple`).
    """
    width, height = size
    if not data.buckets:
        return data.resolution, data.resolution
    return min(bucket_shapes(data.resolution, multiple), key=lambda shape: _apart(shape, (height, width)))


def covering(size: tuple[int, int], shape: Shape) -> tuple[int, int]:
    """The (width, height) to which a photo of (width, height) is resized, so that it just covers a shape."""
    (width, height), (rows, columns) = size, shape
    if rows * width >= columns * height:
        return max(columns, round(width * rows / height)), rows
    return columns, max(rows, round(height * columns / width))


def offset(spare: int, share: float) -> int:
    """Pixels before the crop, for a share in [0, 1] of the spare room."""
    return min(int(share * (spare + 1)), spare)


def size_ids(size: tuple[int, int], shape: Shape, crop: tuple[float, float]) -> list[float]:
    """What SDXL is told of a photo of (width, height): original height and width, crop top and left in the resized
    photo, target height and width, in pixels. crop: see `images.fit`."""
    across, down = covering(size, shape)
    offsets = [offset(down - shape[0], crop[0]), offset(across - shape[1], crop[1])]
    return [float(value) for value in (*size[::-1], *offsets, *shape)]


def lost(size: tuple[int, int], shape: Shape) -> float:
    """Share of a photo of (width, height) that the crop to a shape leaves out."""
    return 1 - math.exp(-_apart(shape, size[::-1]))


def _apart(one: tuple[float, float], other: tuple[float, float]) -> float:
    """How far apart two ratios are: the difference of their logarithms."""
    return abs(math.log(one[0] * other[1] / (one[1] * other[0])))
