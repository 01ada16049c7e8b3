"""The sprite atlases: the emoji drawings that the picture world is made of, written and read.

A sprite is one drawing (72 x 72 RGBA, straight alpha) of one class by one vendor. An atlas is a PNG sheet and a JSON
list. There are two: `train` (four vendors) and `heldout` (two vendors). No model of `dbtrain.tiny` is trained on
`heldout`; the demo's subjects and the held-out measurements come from this atlas.
"""

import io
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from dbtrain.tiny import ASSETS

CELL = 72
COLUMNS = 16
LARGE = Path(__file__).parent / "atlas"
"""Folder of the atlases at twice the size, which the 128-pixel world is drawn from; they are in no wheel."""

VENDORS = {
    "noto": ("Apache-2.0", "Noto Emoji, Google Inc"),
    "noto-v1": ("Apache-2.0", "Noto Emoji (version 1), Google Inc"),
    "twemoji": ("CC-BY-4.0", "Twemoji, Twitter and contributors (jdecked/twemoji)"),
    "emojione": ("CC-BY-4.0", "EmojiOne 2 / EmojiTwo, Emoji One"),
    "fluent-emoji": ("MIT", "Fluent Emoji, Microsoft Corporation"),
    "fluent-emoji-flat": ("MIT", "Fluent Emoji Flat, Microsoft Corporation"),
}
"""Art set (npm package `@iconify-json/<name>`) -> (SPDX licence, credit)."""

HELD_OUT = ("fluent-emoji", "fluent-emoji-flat")
"""Art sets that no model of `dbtrain.tiny` is trained on."""

CLASSES = {
    "dog": ("dog", "dog-face", "poodle", "guide-dog", "service-dog"),
    "cat": ("cat", "cat-face", "black-cat"),
    "rabbit": ("rabbit", "rabbit-face"),
    "bear": ("bear", "bear-face", "polar-bear"),
    "fox": ("fox", "fox-face"),
    "lion": ("lion", "lion-face"),
    "owl": ("owl",),
    "penguin": ("penguin",),
    "frog": ("frog", "frog-face"),
    "turtle": ("turtle",),
    "elephant": ("elephant",),
    "fish": ("fish", "tropical-fish"),
    "car": ("automobile", "oncoming-automobile", "racing-car", "sport-utility-vehicle", "taxi"),
    "bus": ("bus", "oncoming-bus", "minibus"),
    "rocket": ("rocket",),
    "airplane": ("airplane", "small-airplane"),
    "robot": ("robot", "robot-face"),
    "teapot": ("teapot",),
    "backpack": ("backpack",),
    "clock": ("alarm-clock", "mantelpiece-clock", "ten-oclock"),
    "sneaker": ("running-shoe",),
    "guitar": ("guitar",),
    "umbrella": ("umbrella",),
    "cake": ("birthday-cake",),
    "doughnut": ("doughnut",),
    "pizza": ("pizza",),
}
"""Class noun -> emoji names that show it."""

LIVE = ("dog", "cat", "rabbit", "bear", "fox", "lion", "owl", "penguin", "frog", "turtle", "elephant", "fish", "robot")
"""Classes that wear accessories."""

ACCESSORIES = {
    "hat": ("top-hat",),
    "crown": ("crown",),
    "sunglasses": ("sunglasses",),
    "bow": ("ribbon",),
    "cap": ("billed-cap",),
}
"""Accessory noun -> emoji names."""


@dataclass(frozen=True)
class Sprite:
    """One drawing: its class noun or accessory noun, art set, emoji name and licence (SPDX)."""

    noun: str
    vendor: str
    name: str
    licence: str


def _wanted(vendors: tuple) -> list:
    """(noun, vendor, emoji name) of every drawing that an atlas of `vendors` should hold, classes first."""
    return [
        (noun, vendor, name)
        for noun, names in {**CLASSES, **ACCESSORIES}.items()
        for name in names
        for vendor in vendors
    ]


def _render(body: str, width: int, height: int, side: int) -> Image.Image:
    """One SVG body as a `side` x `side` RGBA picture: cut to what is not transparent, and centred."""
    import resvg_py

    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {names} viewBox="0 0 {width} {height}">{body}</svg>'
    raw = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=max(256, 3 * side), height=max(256, 3 * side)))
    image = Image.open(io.BytesIO(raw)).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox())
    image.thumbnail((side, side), Image.LANCZOS)
    cell = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    cell.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return cell


def build(packages: Path, vendors: tuple, target: Path, side: int = CELL) -> int:
    """Write the atlas of `vendors` to `target`.png and `target`.json, and return the number of its sprites.

    packages: the folder of the unpacked `@iconify-json/*` packages. A vendor's missing emoji are left out.
    side: pixels of a sprite's cell.
    Colour values are rounded to steps of 4: the eye sees no difference, and the sheets are a quarter smaller.
    """
    sets = {vendor: json.loads((packages / vendor / "icons.json").read_text(encoding="utf-8")) for vendor in vendors}
    rows, cells = [], []
    for noun, vendor, name in _wanted(vendors):
        icon = sets[vendor]["icons"].get(name)
        if icon is None:
            continue
        width = icon.get("width", sets[vendor].get("width", 16))
        height = icon.get("height", sets[vendor].get("height", 16))
        cells.append(_render(icon["body"], width, height, side))
        rows.append(Sprite(noun, vendor, name, VENDORS[vendor][0]))
    sheet = Image.new("RGBA", (COLUMNS * side, -(-len(cells) // COLUMNS) * side), (0, 0, 0, 0))
    for index, cell in enumerate(cells):
        sheet.paste(cell, (index % COLUMNS * side, index // COLUMNS * side))
    target.parent.mkdir(parents=True, exist_ok=True)
    steps = np.minimum(255, (np.asarray(sheet, np.int16) + 2) // 4 * 4).astype(np.uint8)
    Image.fromarray(steps).save(target.with_suffix(".png"), optimize=True)
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    target.with_suffix(".json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return len(rows)


@lru_cache(maxsize=4)
def load(split: str = "train", scale: int = 1) -> tuple:
    """(sprites, pictures) of one atlas: a list of `Sprite`, and their RGBA pictures without transparent margins.

    scale: 1, or 2 for the same drawings at twice the size.
    """
    path, side = (ASSETS / "atlas" if scale == 1 else LARGE) / split, CELL * scale
    rows = [Sprite(**row) for row in json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))]
    sheet = Image.open(path.with_suffix(".png")).convert("RGBA")
    pictures = []
    for index in range(len(rows)):
        x, y = index % COLUMNS * side, index // COLUMNS * side
        cell = sheet.crop((x, y, x + side, y + side))
        pictures.append(cell.crop(cell.getchannel("A").getbbox()))
    return rows, pictures


@lru_cache(maxsize=64)
def of_noun(noun: str, split: str = "train") -> tuple:
    """Indices into `load(split)` of the sprites that show `noun`."""
    return tuple(index for index, row in enumerate(load(split)[0]) if row.noun == noun)


@lru_cache(maxsize=1024)
def head(index: int, split: str = "train") -> tuple:
    """(centre x, width) of a sprite's head as shares of the sprite's width: what is drawn in its top fifth."""
    alpha = np.asarray(load(split)[1][index].getchannel("A")) > 100
    top = alpha[: max(3, round(alpha.shape[0] * 0.2))]
    columns = np.flatnonzero(top.any(axis=0))
    centre = float(np.average(np.arange(alpha.shape[1]), weights=top.sum(axis=0) + 1e-6)) / alpha.shape[1]
    width = float(columns[-1] - columns[0] + 1) / alpha.shape[1]
    return centre, max(width, 0.35)
