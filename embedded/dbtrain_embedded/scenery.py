"""Backgrounds of the picture world: flat illustrations with few edges.

A painter draws a scene of 128 x 128 pixels or more with a `Brush`. It is then halved, which makes its edges smooth.
Scenes have no fine texture on purpose. An 8x VAE and a small UNet, trained on two cores, learn big shapes; they would
spend on texture what they need for a sharp subject.
"""

from PIL import Image, ImageDraw

SIDE = 128
"""Pixels of the smallest canvas."""


class Brush:
    """A canvas. Coordinates are in 0..1, colours are RGB in 0..255; `rng` moves both a little, so scenes differ."""

    def __init__(self, rng, side: int = SIDE):
        self.side = side
        self.image = Image.new("RGB", (side, side))
        self.pen = ImageDraw.Draw(self.image)
        self.shift = int(rng.integers(-8, 9))
        self.rng = rng

    def tone(self, colour: tuple) -> tuple:
        """The colour, made lighter or darker by what this scene is."""
        return tuple(min(255, max(0, value + self.shift)) for value in colour)

    def near(self, value: float, spread: float = 0.04) -> float:
        """A random coordinate within `spread` of `value`."""
        return float(value + self.rng.uniform(-spread, spread))

    def box(self, x0, y0, x1, y1, colour) -> None:
        """Draw a filled rectangle."""
        self.pen.rectangle([x0 * self.side, y0 * self.side, x1 * self.side, y1 * self.side], fill=self.tone(colour))

    def disc(self, x, y, rx, ry, colour) -> None:
        """Draw a filled ellipse around (x, y)."""
        corners = [(x - rx) * self.side, (y - ry) * self.side, (x + rx) * self.side, (y + ry) * self.side]
        self.pen.ellipse(corners, fill=self.tone(colour))

    def shape(self, points, colour) -> None:
        """Draw a filled polygon."""
        self.pen.polygon([(x * self.side, y * self.side) for x, y in points], fill=self.tone(colour))


def _plain(b: Brush) -> None:
    tones = ((248, 248, 248), (240, 236, 228), (226, 232, 240), (232, 240, 230))
    b.box(0, 0, 1, 1, tones[int(b.rng.integers(len(tones)))])


def _jungle(b: Brush) -> None:
    b.box(0, 0, 1, 1, (38, 92, 52))
    b.box(0, b.near(0.8), 1, 1, (28, 68, 40))
    for x, y in ((0.02, 0.1), (0.35, 0.0), (0.7, 0.02), (1.0, 0.15), (0.0, 0.55), (1.0, 0.6)):
        b.disc(b.near(x), b.near(y), 0.2, 0.13, (62, 140, 66))
    for x, y in ((0.18, 0.02), (0.9, 0.0), (0.0, 0.32), (1.0, 0.38)):
        b.disc(b.near(x), b.near(y), 0.09, 0.15, (98, 176, 76))


def _snow(b: Brush) -> None:
    b.box(0, 0, 1, 1, (176, 206, 232))
    top = b.near(0.5)
    b.disc(b.near(0.2), top + 0.35, 0.7, 0.4, (226, 236, 246))
    b.disc(b.near(0.85), top + 0.5, 0.8, 0.5, (246, 250, 255))
    for x, y in ((0.12, 0.12), (0.4, 0.06), (0.7, 0.14), (0.92, 0.3), (0.05, 0.4)):
        b.disc(b.near(x), b.near(y), 0.025, 0.025, (252, 252, 255))


def _beach(b: Brush) -> None:
    b.box(0, 0, 1, 1, (140, 206, 244))
    top = b.near(0.42)
    b.box(0, top, 1, 1, (30, 128, 190))
    b.box(0, top + 0.2, 1, 1, (240, 214, 150))
    b.disc(b.near(0.84), b.near(0.13), 0.09, 0.09, (255, 236, 120))


def _cobblestone(b: Brush) -> None:
    b.box(0, 0, 1, 1, (96, 92, 90))
    offset = b.rng.uniform(-0.08, 0.08)
    for row in range(5):
        for column in range(-1, 5):
            x = (column + 0.5 * (row % 2)) * 0.27 + offset
            b.pen.rounded_rectangle(
                [x * b.side, (row * 0.21 - 0.02) * b.side, (x + 0.24) * b.side, (row * 0.21 + 0.165) * b.side],
                radius=9 * b.side / SIDE,
                fill=b.tone((158, 154, 150) if (row + column) % 3 else (136, 132, 130)),
            )


def _grass(b: Brush) -> None:
    b.box(0, 0, 1, 1, (128, 200, 84))
    for x, y in (
        (0.1, 0.12),
        (0.5, 0.06),
        (0.88, 0.16),
        (0.06, 0.5),
        (0.94, 0.52),
        (0.14, 0.9),
        (0.52, 0.95),
        (0.9, 0.88),
    ):
        x, y = b.near(x), b.near(y)
        b.shape(
            [
                (x - 0.07, y),
                (x - 0.05, y - 0.1),
                (x - 0.015, y - 0.03),
                (x, y - 0.13),
                (x + 0.02, y - 0.03),
                (x + 0.06, y - 0.1),
                (x + 0.07, y),
            ],
            (76, 150, 52),
        )


def _pink_fabric(b: Brush) -> None:
    b.box(0, 0, 1, 1, (246, 168, 196))
    for x in (0.05, 0.4, 0.78):
        x = b.near(x)
        b.shape([(x, 0), (x + 0.12, 0), (x + 0.24, 0.5), (x + 0.12, 1), (x, 1), (x + 0.12, 0.5)], (230, 132, 170))


def _wooden_floor(b: Brush) -> None:
    b.box(0, 0, 1, 1, (184, 128, 76))
    offset = b.rng.uniform(0, 0.1)
    for row in range(-1, 5):
        y = row * 0.22 + offset
        if row % 2:
            b.box(0, y, 1, y + 0.22, (168, 112, 62))
        b.box(0, y, 1, y + 0.02, (120, 76, 40))


def _city(b: Brush) -> None:
    b.box(0, 0, 1, 1, (196, 220, 240))
    for x, y in ((-0.02, 0.3), (0.19, 0.14), (0.4, 0.34), (0.6, 0.1), (0.82, 0.26)):
        y = b.near(y)
        b.box(x, y, x + 0.18, 0.8, (104, 116, 140))
        for row in range(3):
            b.box(x + 0.04, y + 0.05 + row * 0.12, x + 0.14, y + 0.1 + row * 0.12, (236, 220, 140))
    b.box(0, 0.78, 1, 1, (120, 120, 124))


def _mountain(b: Brush) -> None:
    b.box(0, 0, 1, 1, (150, 200, 240))
    for x, y in ((b.near(0.24), b.near(0.16)), (b.near(0.76), b.near(0.06))):
        b.shape([(x, y), (x - 0.5, 0.75), (x + 0.5, 0.75)], (112, 108, 128))
        b.shape([(x, y), (x - 0.14, y + 0.2), (x, y + 0.15), (x + 0.14, y + 0.2)], (248, 250, 255))
    b.box(0, 0.7, 1, 1, (104, 160, 84))


def _water(b: Brush) -> None:
    b.box(0, 0, 1, 1, (44, 140, 210))
    offset = b.rng.uniform(-0.08, 0.08)
    for row in range(4):
        for column in range(-1, 4):
            b.disc(column * 0.36 + 0.18 * (row % 2) + offset, 0.12 + row * 0.26, 0.12, 0.022, (126, 200, 240))


def _desert(b: Brush) -> None:
    b.box(0, 0, 1, 1, (250, 224, 160))
    b.disc(b.near(0.82), b.near(0.16), 0.1, 0.1, (255, 250, 214))
    b.disc(b.near(0.15), 0.92, 0.75, b.near(0.42), (226, 162, 84))
    b.disc(b.near(0.9), 1.05, 0.8, b.near(0.4), (206, 136, 62))


def _space(b: Brush) -> None:
    b.box(0, 0, 1, 1, (20, 18, 48))
    for x, y in (
        (0.08, 0.1),
        (0.36, 0.05),
        (0.66, 0.12),
        (0.06, 0.46),
        (0.94, 0.5),
        (0.12, 0.84),
        (0.5, 0.95),
        (0.92, 0.86),
    ):
        b.disc(b.near(x), b.near(y), 0.018, 0.018, (250, 250, 230))
    b.disc(b.near(0.87), b.near(0.15), 0.11, 0.11, (196, 120, 220))


def _purple_rug(b: Brush) -> None:
    b.box(0, 0, 1, 1, (226, 206, 176))
    x, y = b.near(0.5), b.near(0.58)
    b.disc(x, y, 0.54, 0.44, (92, 48, 140))
    b.disc(x, y, 0.46, 0.36, (138, 84, 190))


def _night(b: Brush) -> None:
    b.box(0, 0, 1, 1, (26, 38, 92))
    x, y = b.near(0.16), b.near(0.16)
    b.disc(x, y, 0.1, 0.1, (250, 240, 190))
    b.disc(x + 0.05, y - 0.03, 0.085, 0.085, (26, 38, 92))
    b.box(0, b.near(0.74), 1, 1, (14, 22, 50))


def _sunset(b: Brush) -> None:
    for y, colour in ((0, (120, 60, 130)), (0.2, (214, 88, 108)), (0.38, (246, 140, 80)), (0.54, (254, 192, 96))):
        b.box(0, y, 1, 1, colour)
    y = b.near(0.68)
    b.disc(b.near(0.22), y, 0.13, 0.13, (255, 236, 160))
    b.box(0, y, 1, 1, (92, 44, 84))


SCENES = {
    "plain": (_plain, ("",)),
    "jungle": (_jungle, ("in the jungle",)),
    "snow": (_snow, ("in the snow",)),
    "beach": (_beach, ("on the beach",)),
    "cobblestone": (_cobblestone, ("on a cobblestone street",)),
    "grass": (_grass, ("on top of green grass", "on green grass")),
    "pink fabric": (_pink_fabric, ("on top of pink fabric", "on pink fabric")),
    "wooden floor": (_wooden_floor, ("on top of a wooden floor", "on a wooden floor")),
    "city": (_city, ("with a city in the background", "in the city")),
    "mountain": (_mountain, ("with a mountain in the background", "in front of a mountain")),
    "water": (_water, ("floating on top of water", "on the water")),
    "desert": (_desert, ("in the desert",)),
    "space": (_space, ("in space",)),
    "purple rug": (_purple_rug, ("on top of a purple rug", "on a purple rug")),
    "night": (_night, ("at night",)),
    "sunset": (_sunset, ("at sunset", "with a sunset in the background")),
}
"""Scene -> (painter, phrases that name the scene in a caption)."""


def paint(scene: str, rng, side: int = 64) -> Image.Image:
    """A `side` x `side` RGB background of `scene`; `rng` decides what differs between two of them."""
    brush = Brush(rng, max(SIDE, 2 * side))
    SCENES[scene][0](brush)
    return brush.image.reduce(brush.side // side)
