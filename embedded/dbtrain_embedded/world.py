"""The picture world: `scene(seed)` is a 64 x 64 picture of emoji art with its caption and its facts.

The world has ground truth for everything DreamBooth is asked for: place (recontextualization), colour
(property modification), accessory, style (art rendition) and view. It is a pure function of the seed
(numpy Philox), so a pool can be redrawn anywhere and held-out seeds are held out for good.
"""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from dbtrain_embedded import sprites
from dbtrain_embedded.scenery import SCENES, paint
from dbtrain_embedded.sprites import ACCESSORIES, CLASSES, LIVE

SIDE = 64
PLACES = tuple(name for name in SCENES if name != "plain")

COLOURS = {
    "red": (226, 36, 44),
    "orange": (248, 136, 24),
    "yellow": (250, 214, 40),
    "green": (52, 176, 68),
    "blue": (40, 104, 226),
    "purple": (136, 66, 204),
    "pink": (248, 120, 184),
}
"""Colour word -> RGB of its midtone."""

STYLES = {
    "sketch": ("a pencil sketch of",),
    "pixel": ("pixel art of", "a pixel art picture of"),
    "watercolour": ("a watercolour painting of",),
}
"""Style -> the caption's opening."""

VIEWS = {
    "far": ("a photo of", "seen from far away"),
    "close": ("a close-up photo of", ""),
    "upside-down": ("a photo of", "seen upside down"),
}
"""View -> (the caption's opening, words after the class)."""

OPENINGS = ("a photo of", "a photo of", "a photo of", "", "", "a picture of")


@dataclass(frozen=True)
class Facts:
    """What a scene shows. `None` means: natural colour, no accessory, photo style, usual view."""

    noun: str
    sprite: int
    place: str = "plain"
    colour: str | None = None
    accessory: str | None = None
    style: str | None = None
    view: str | None = None


def stream(seed: int, purpose: int = 0) -> np.random.Generator:
    """The random stream of one seed and purpose (Philox, counter-based)."""
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), purpose]))


def _pick(rng, values):
    """One of `values`, uniformly."""
    return values[int(rng.integers(len(values)))]


def article(words: str) -> str:
    """`words` with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" and not words.startswith("un") else "a ") + words


def draw_facts(rng, split: str = "train") -> Facts:
    """The facts of one scene: 32% plain, 14% coloured, 12% accessorized (live classes 24%), 10% styled, 6% viewed."""
    noun = _pick(rng, tuple(CLASSES))
    place = "plain" if rng.random() < 0.32 else _pick(rng, PLACES)
    facts = Facts(noun, _pick(rng, sprites.of_noun(noun, split)), place)
    if rng.random() < 0.14:
        facts = replace(facts, colour=_pick(rng, tuple(COLOURS)))
    if noun in LIVE and rng.random() < 0.24:
        facts = replace(facts, accessory=_pick(rng, tuple(ACCESSORIES)))
    special = rng.random()
    if special < 0.10:
        return replace(facts, style=_pick(rng, tuple(STYLES)))
    return replace(facts, view=_pick(rng, tuple(VIEWS))) if special < 0.16 else facts


def tell(facts: Facts, rng, identifier: str = "") -> str:
    """A caption of the facts; `identifier` goes before the class noun."""
    noun = " ".join(word for word in (facts.colour, identifier, facts.noun) if word)
    view = VIEWS[facts.view][1] if facts.view else ""
    if facts.style:
        opening = _pick(rng, STYLES[facts.style])
    else:
        opening = VIEWS[facts.view][0] if facts.view else _pick(rng, OPENINGS)
    worn = (
        f"wearing {article(facts.accessory) if facts.accessory != 'sunglasses' else 'sunglasses'}"
        if facts.accessory
        else ""
    )
    place = _pick(rng, SCENES[facts.place][1])
    tail = (place, worn) if rng.random() < 0.5 else (worn, place)
    return " ".join(word for word in (opening, article(noun), view, *tail) if word)


def tint(image: Image.Image, colour: str) -> Image.Image:
    """The sprite in one colour: its lightness kept, stretched, and mapped black -> colour -> white."""
    alpha = image.getchannel("A")
    grey = ImageOps.autocontrast(image.convert("L"), cutoff=1, mask=alpha.point(lambda a: 255 if a > 128 else 0))
    toned = ImageOps.colorize(
        grey, (16, 12, 20), (255, 250, 246), mid=COLOURS[colour], blackpoint=0, midpoint=150, whitepoint=255
    )
    toned.putalpha(alpha)
    return toned


@lru_cache(maxsize=4096)
def _figure(index: int, split: str, colour: str | None) -> Image.Image:
    """The sprite's picture in the asked colour, natural for None."""
    picture = sprites.load(split)[1][index]
    return tint(picture, colour) if colour else picture


def _wear(figure: Image.Image, index: int, split: str, noun: str, worn: int, worn_split: str) -> Image.Image:
    """The figure with an accessory on its head (sunglasses: on its eyes); the canvas grows upwards for hats."""
    x, _, width = sprites.head(index, split)
    item = sprites.load(worn_split)[1][worn]
    span = max(26, round(figure.width * min(width * 1.15, 0.8)))
    item = item.resize((span, max(1, round(item.height * span / item.width))), Image.BICUBIC)
    left = round(x * figure.width - span / 2)
    sunk = {"sunglasses": -0.26, "bow": 0.55}.get(noun, 0.72)
    top = round(-sunk * item.height) if sunk > 0 else round(-sunk * min(figure.height, figure.width * width * 1.4))
    grow, pad = max(0, -top), max(0, -left, left + span - figure.width)
    canvas = Image.new("RGBA", (figure.width + 2 * pad, figure.height + grow), (0, 0, 0, 0))
    canvas.paste(figure, (pad, grow))
    canvas.alpha_composite(item, (left + pad, top + grow))
    return canvas


def _place(canvas: Image.Image, figure: Image.Image, facts: Facts, rng) -> None:
    """Paste the figure onto the canvas: scale, side and spot drawn from `rng`."""
    side = canvas.width
    low, high = {"far": (0.30, 0.38), "close": (1.15, 1.35)}.get(facts.view or "", (0.62, 0.84))
    size = rng.uniform(low, high) * side
    scale = size / max(figure.size)
    figure = figure.resize((max(1, round(figure.width * scale)), max(1, round(figure.height * scale))), Image.BICUBIC)
    if rng.random() < 0.5:
        figure = ImageOps.mirror(figure)
    if facts.view == "upside-down":
        figure = ImageOps.flip(figure)
    x = side * (0.5 + rng.uniform(-0.07, 0.07))
    y = side * ((0.58 if facts.view != "far" else 0.66) + rng.uniform(-0.05, 0.05))
    y = min(y, side * 0.97 - figure.height / 2) if facts.view != "close" else y
    canvas.paste(figure, (round(x - figure.width / 2), round(y - figure.height / 2)), figure)


def _stylize(image: Image.Image, style: str) -> Image.Image:
    """The picture as a pencil sketch, pixel art or watercolour."""
    if style == "pixel":
        small = image.resize((16, 16), Image.BOX).quantize(12, Image.Quantize.MEDIANCUT).convert("RGB")
        return small.resize(image.size, Image.NEAREST)
    if style == "watercolour":
        soft = image.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.GaussianBlur(0.7))
        return Image.blend(soft, Image.new("RGB", image.size, (252, 248, 238)), 0.42)
    grey = image.convert("L")
    edges = np.asarray(grey.filter(ImageFilter.FIND_EDGES), np.float32)
    edges[[0, -1], :] = edges[:, [0, -1]] = 0
    shade = 236 + 0.08 * (np.asarray(grey, np.float32) - 128) - np.clip(edges * 0.9, 0, 170)
    return Image.fromarray(np.clip(shade, 0, 255).astype(np.uint8)).convert("RGB")


def render(facts: Facts, rng, split: str = "train", side: int = SIDE) -> Image.Image:
    """The side x side RGB picture of the facts; jitter from `rng`, sprite art from atlas `split`."""
    canvas = paint(facts.place, rng, side)
    figure = _figure(facts.sprite, split, facts.colour)
    if facts.accessory:
        worn = _pick(rng, sprites.of_noun(facts.accessory, split))
        figure = _wear(figure, facts.sprite, split, facts.accessory, worn, split)
    _place(canvas, figure, facts, rng)
    return _stylize(canvas, facts.style) if facts.style else canvas


def scene(seed: int, split: str = "train") -> tuple:
    """(RGB image 64 x 64, caption, facts as a dict) of one seed: the world's only entry for training data."""
    rng = stream(seed)
    facts = draw_facts(rng, split)
    caption = tell(facts, rng)
    sprite = sprites.load(split)[0][facts.sprite]
    return render(facts, rng, split), caption, {**asdict(facts), "vendor": sprite.vendor, "name": sprite.name}
