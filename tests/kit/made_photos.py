"""Pictures and samples made on the spot."""

import io

import numpy as np
from PIL import Image

from dbtrain.data.index import make_key
from dbtrain.values import Role, Sample


def picture(width=48, height=40, seed=0) -> Image.Image:
    """A smooth asymmetric picture, so that every turn and mirror image differs."""
    y, x = np.mgrid[:height, :width]
    red, green = x * 255 // width, y * 255 // height
    return Image.fromarray(np.stack([red, green, (x * y + 37 * seed) % 256], axis=2).astype(np.uint8))


def png(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def jpeg(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, **options)
    return out.getvalue()


def make_samples(subjects=3, photos=4):
    for number in range(subjects):
        name = f"cat-{number}"
        for photo in range(photos):
            image = png(picture(seed=10 * number + photo))
            key = make_key(name, Role.INSTANCE, photo)
            caption = f"a photo of {{identifier}} {number}é"
            yield Sample(key, name, Role.INSTANCE, caption, image, "png", {"source": "x.png"})


def mask_of(width=48, height=40, left=12) -> Image.Image:
    """A mask that is white from the column `left` on."""
    grey = np.zeros((height, width), np.uint8)
    grey[:, left:] = 255
    return Image.fromarray(grey)
