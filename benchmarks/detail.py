"""How close an enlarged picture comes to the true one: what both benchmarks of the second stage measure."""

import torch
from PIL import Image
from torch import Tensor

from dbtrain.evaluate.features import Encoder
from dbtrain.evaluate.patches import patch_distances


def to_image(picture: Tensor) -> Image.Image:
    """The PIL picture of one (3, H, W) in [-1, 1]."""
    values = picture.clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def tile_distances(encoder: Encoder, pictures: Tensor, true: Tensor, tile: int = 64) -> Tensor:
    """The patch distance (N,) of pictures (N, 3, H, W) to the true ones, float64: the mean over tiles.

    The embedded encoders read 64 pixels. A larger picture would be reduced for them, and its detail with it; its tiles
    are not.
    """
    found = []
    for picture, truth in zip(pictures, true, strict=True):
        pairs = [
            (picture[:, y : y + tile, x : x + tile], truth[:, y : y + tile, x : x + tile])
            for y in range(0, picture.shape[1], tile)
            for x in range(0, picture.shape[2], tile)
        ]
        found.append(torch.stack([patch_distances(encoder, [to_image(a), to_image(b)])[0] for a, b in pairs]).mean())
    return torch.stack(found)


def sharpness(pictures: Tensor) -> Tensor:
    """The mean absolute difference (N,) of neighbouring pixels."""
    return pictures.diff(dim=-1).abs().mean(dim=(1, 2, 3)) + pictures.diff(dim=-2).abs().mean(dim=(1, 2, 3))
