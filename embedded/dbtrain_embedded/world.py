"""The picture world: `scene(seed)` is a 64 x 64 picture of emoji art with its caption and its facts.

The facts are the ground truth for everything that DreamBooth is asked to do: place (recontextualization), colour
(property modification), accessory, style (art rendition) and view. A scene is a function of its seed alone (numpy
Philox), so a pool can be drawn again anywhere, and held-out seeds stay held out.
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
"""Colour word -> RGB of its middle tone."""

STYLES = {
    "sketch": ("a pencil sketch of",),
    "pixel": ("pixel art of", "a pixel art picture of"),
    "watercolour": ("a watercolour painting of",),
}
"""Style -> possible openings of the caption."""

VIEWS = {
    "far": ("a photo of", "seen from far away"),
    "close": ("a close-up photo of", ""),
    "upside-down": ("a photo of", "seen upside down"),
}
"""View -> (opening of the caption, words after the class noun)."""

OPENINGS = ("a photo of", "a photo of", "a photo of", "", "", "a picture of")


@dataclass(frozen=True)
class Facts:
    """What a scene shows. None means: natural colour, no accessory, photo style, usual view."""

    noun: str
    sprite: int
    place: str = "plain"
    colour: str | None = None
    accessory: str | None = None
    style: str | None = None
    view: str | None = None


def stream(seed: int, purpose: int = 0) -> np.random.Generator:
    """The random generator of one seed and purpose (Philox, counter-based)."""
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), purpose]))


def _pick(rng, values):
    """One of `values`, all equally likely."""
    return values[int(rng.integers(len(values)))]


def article(words: str) -> str:
    """`words` with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" and not words.startswith("un") else "a ") + words


def draw_facts(rng, split: str = "train") -> Facts:
    """Random facts of one scene.

    32% have no place, 14% a colour, 10% a style and 6% a view; 24% of the live classes wear an accessory.
    """
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


def caption_of(facts: Facts, rng) -> str:
    """A caption of the facts; `rng` chooses its opening, its phrase for the place, and the order."""
    noun = " ".join(word for word in (facts.colour, facts.noun) if word)
    view = VIEWS[facts.view][1] if facts.view else ""
    if facts.style:
        opening = _pick(rng, STYLES[facts.style])
    else:
        opening = VIEWS[facts.view][0] if facts.view else _pick(rng, OPENINGS)
    worn = ""
    if facts.accessory:
        worn = f"wearing {facts.accessory if facts.accessory == 'sunglasses' else article(facts.accessory)}"
    place = _pick(rng, SCENES[facts.place][1])
    tail = (place, worn) if rng.random() < 0.5 else (worn, place)
    return " ".join(word for word in (opening, article(noun), view, *tail) if word)


def tint(image: Image.Image, colour: str) -> Image.Image:
    """The sprite in one colour. Its lightness is stretched and mapped to black -> colour -> white; alpha is kept."""
    alpha = image.getchannel("A")
    grey = ImageOps.autocontrast(image.convert("L"), cutoff=1, mask=alpha.point(lambda a: 255 if a > 128 else 0))
    toned = ImageOps.colorize(
        grey, (16, 12, 20), (255, 250, 246), mid=COLOURS[colour], blackpoint=0, midpoint=150, whitepoint=255
    )
    toned.putalpha(alpha)
    return toned


@lru_cache(maxsize=4096)
def _figure(index: int, split: str, colour: str | None, scale: int) -> Image.Image:
    """The picture of a sprite in one colour, at `scale` times the atlas's size; None is its natural colour."""
    picture = sprites.load(split, scale)[1][index]
    return tint(picture, colour) if colour else picture


def _dressed(figure: Image.Image, facts: Facts, worn: int, split: str, scale: int) -> Image.Image:
    """The figure with sprite `worn` on its head (sunglasses: on its eyes), on a canvas with room for both."""
    centre, width = sprites.head(facts.sprite, split)
    item = sprites.load(split, scale)[1][worn]
    item_width = max(26 * scale, round(figure.width * min(width * 1.15, 0.8)))
    item = item.resize((item_width, max(1, round(item.height * item_width / item.width))), Image.BICUBIC)
    left = round(centre * figure.width - item_width / 2)
    if facts.accessory == "sunglasses":
        # The eyes are about a quarter of a head below its top, and a head is about 1.4 times as high as it is wide.
        top = round(0.26 * min(figure.height, figure.width * width * 1.4))
    else:
        # This share of the item stands above the figure; the rest covers the top of its head.
        top = round(-(0.55 if facts.accessory == "bow" else 0.72) * item.height)
    above, aside = max(0, -top), max(0, -left, left + item_width - figure.width)
    canvas = Image.new("RGBA", (figure.width + 2 * aside, figure.height + above), (0, 0, 0, 0))
    canvas.paste(figure, (aside, above))
    canvas.alpha_composite(item, (left + aside, top + above))
    return canvas


def _place(canvas: Image.Image, figure: Image.Image, facts: Facts, rng) -> None:
    """Paste the figure onto the canvas; `rng` decides its size, direction and position."""
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
    """The picture as a pencil sketch, as pixel art or as a watercolour."""
    if style == "pixel":
        small = image.resize((16, 16), Image.BOX).quantize(12, Image.Quantize.MEDIANCUT).convert("RGB")
        return small.resize(image.size, Image.NEAREST)
    if style == "watercolour":
        scale = image.width / SIDE
        window = 2 * round(2 * scale) + 1
        soft = image.filter(ImageFilter.MedianFilter(window)).filter(ImageFilter.GaussianBlur(0.7 * scale))
        return Image.blend(soft, Image.new("RGB", image.size, (252, 248, 238)), 0.42)
    grey = image.convert("L")
    edges = np.asarray(grey.filter(ImageFilter.FIND_EDGES), np.float32)
    edges[[0, -1], :] = edges[:, [0, -1]] = 0
    shade = 236 + 0.08 * (np.asarray(grey, np.float32) - 128) - np.clip(edges * 0.9, 0, 170)
    return Image.fromarray(np.clip(shade, 0, 255).astype(np.uint8)).convert("RGB")


def render(facts: Facts, rng, split: str = "train", side: int = SIDE) -> Image.Image:
    """A `side` x `side` RGB picture of the facts, with art of atlas `split`; `rng` decides the rest.

    Above 64 pixels the drawings are those of the large atlas.
    """
    canvas, scale = paint(facts.place, rng, side), 1 if side <= SIDE else 2
    figure = _figure(facts.sprite, split, facts.colour, scale)
    if facts.accessory:
        worn = _pick(rng, sprites.of_noun(facts.accessory, split))
        figure = _dressed(figure, facts, worn, split, scale)
    _place(canvas, figure, facts, rng)
    return _stylize(canvas, facts.style) if facts.style else canvas


def scene(seed: int, split: str = "train", side: int = SIDE) -> tuple:
    """(RGB picture `side` x `side`, caption, facts as a dict) of one seed; all training data are made by this function.

    The layout of a seed is the same at 64 and at 128 pixels.
    """
    rng = stream(seed)
    facts = draw_facts(rng, split)
    caption = caption_of(facts, rng)
    sprite = sprites.load(split)[0][facts.sprite]
    return render(facts, rng, split, side), caption, {**asdict(facts), "vendor": sprite.vendor, "name": sprite.name}
