"""How a photo looks, in two small values: whether it is sharp, and what it shows in the large.

The borders were chosen on the 107 photos of the 20 subjects of google/dreambooth: of these none is below BLURRED, and
no two of a subject are ALIKE. `docs/data.md` has the numbers.
"""

import numpy as np
from PIL import Image

JUDGED = (128, 512)
"""Short side, in pixels, at which sharpness is measured: smaller photos are not judged, larger ones are reduced."""
CENTRE = 0.7
"""Share of each side that sharpness is measured in. Backgrounds may be out of focus."""
BLURRED = 0.015
"""A photo of less sharpness is blurred: by about 2 pixels of 512, or enlarged about four times."""
TINY = 16
"""Side of the picture that stands for a photo where photos are compared."""
ALIKE = 0.99
"""Two photos of at least this likeness are the same picture: saved again, reduced, brightened, or cut by a hair."""


def sharpness(image: Image.Image, side: int) -> float | None:
    """Variance of the Laplacian, divided by that of the grey levels, in the middle of a photo, as it is when its short
    side is reduced to `side` pixels. None for photos and sides too small to tell."""
    short = min(side, JUDGED[1], *image.size)
    if short < JUDGED[0]:
        return None
    width, height = image.size
    left, top = round(width * (1 - CENTRE) / 2), round(height * (1 - CENTRE) / 2)
    middle = image.crop((left, top, width - left, height - top)).convert("L")
    size = [round(length * short / min(image.size)) for length in middle.size]
    grey = np.asarray(middle.resize((size[0], size[1]), Image.Resampling.BILINEAR, reducing_gap=2)).astype(np.int16)
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    # A picture of one colour is not blurred: it has nothing to be sharp.
    spread = float(grey.var(dtype=np.float32))
    return float(laplacian.var(dtype=np.float32)) / spread if spread else None


def tiny_picture(image: Image.Image) -> np.ndarray:
    """float32 [3 * TINY * TINY]: a photo in small, with mean 0 and length 1; all 0 for a photo of one colour."""
    small = image.resize((TINY, TINY), Image.Resampling.BILINEAR, reducing_gap=2)
    pixels = np.asarray(small, dtype=np.float32).ravel()
    pixels = pixels - pixels.mean()
    return pixels / max(float(np.linalg.norm(pixels)), 1.0)


def alike(pictures: list[np.ndarray]) -> list[tuple[int, int, float]]:
    """(first, second, likeness) of each pair of tiny pictures that shows the same; likeness is their correlation."""
    rows = np.reshape(pictures, (len(pictures), 3 * TINY**2))
    likeness = rows @ rows.T
    pairs = zip(*np.nonzero(np.triu(likeness >= ALIKE, 1)))
    return [(int(one), int(two), float(likeness[one, two])) for one, two in pairs]
