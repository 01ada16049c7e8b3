"""The demo's subjects: ten drawings of the held-out art sets in five scenes each, and two photographed subjects."""

from pathlib import Path

from PIL import Image

from dbtrain.tiny import ASSETS
from dbtrain_embedded import sprites, world
from dbtrain_embedded.world import Facts

SUBJECTS = {
    "dog-tan": ("dog", "fluent-emoji-flat", "dog"),
    "robot-white": ("robot", "fluent-emoji-flat", "robot"),
    "backpack-red": ("backpack", "fluent-emoji-flat", "backpack"),
    "dog-poodle": ("dog", "fluent-emoji-flat", "poodle"),
    "cat-striped": ("cat", "fluent-emoji-flat", "cat"),
    "dog-floppy": ("dog", "fluent-emoji-flat", "dog-face"),
    "car-red": ("car", "fluent-emoji-flat", "automobile"),
    "teapot-red": ("teapot", "fluent-emoji", "teapot"),
    "dog-service": ("dog", "fluent-emoji-flat", "service-dog"),
    "rabbit-grey": ("rabbit", "fluent-emoji-flat", "rabbit-face"),
}
"""Subject id -> (class noun, art set, emoji name)."""

SCENES = ("plain", "grass", "wooden floor", "beach", "purple rug")
"""The scenes of a subject's pictures. No other scene is in its training pictures, so prompts can ask for those."""

REAL = {"real-dog": ("dog", "dog6", 5), "real-teapot": ("teapot", "teapot", 5)}
"""Subject id -> (class noun, folder of the google/dreambooth data set, number of pictures taken)."""


def find(noun: str, vendor: str, name: str, split: str = "heldout") -> int:
    """The index of one sprite in atlas `split`; StopIteration where the atlas has no such sprite."""
    rows = sprites.load(split)[0]
    return next(i for i, row in enumerate(rows) if (row.noun, row.vendor, row.name) == (noun, vendor, name))


def pictures(subject: str, places: tuple = SCENES, side: int = world.SIDE, first: int = 0) -> list:
    """One `side` x `side` picture of a drawn subject in each place; size, direction and position differ.

    The layout of picture i is that of number `first` + i of the subject's hundred; it is the same at 64 and at 128
    pixels. The demo's own pictures are the first of them.
    """
    noun, vendor, name = SUBJECTS[subject]
    sprite, seed = find(noun, vendor, name), 50_000 + 100 * list(SUBJECTS).index(subject) + first
    return [
        world.render(Facts(noun, sprite, place), world.stream(seed + i), "heldout", side)
        for i, place in enumerate(places)
    ]


def write(folder: Path, subjects: tuple = tuple(SUBJECTS), side: int = world.SIDE) -> Path:
    """Write `folder`/<subject>/*.png of drawn subjects and `folder`/subjects.csv; the manifest's path."""
    lines = ["subject,class,images"]
    for subject in subjects:
        (folder / subject).mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(pictures(subject, side=side)):
            picture.save(folder / subject / f"{index:02d}.png", optimize=True)
        lines.append(f"{subject},{SUBJECTS[subject][0]},{subject}")
    (folder / "subjects.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "subjects.csv"


def build_drawn() -> None:
    """Write assets/demo/<subject>/*.png and assets/demo/subjects.csv; in assets/demo/large, the same twice as large."""
    write(ASSETS / "demo")
    write(ASSETS / "demo" / "large", side=2 * world.SIDE)


def build_real(dataset: Path, side: int = 160) -> None:
    """Write the photographed subjects, cut to their central square and reduced to `side` x `side` pixels, as JPEG.

    dataset: the unpacked google/dreambooth data set, one folder a subject.
    """
    lines = ["subject,class,images"]
    for subject, (noun, source, count) in REAL.items():
        folder = ASSETS / "demo" / subject
        folder.mkdir(parents=True, exist_ok=True)
        for index, path in enumerate(sorted((dataset / source).glob("*.jpg"))[:count]):
            image = Image.open(path).convert("RGB")
            short = min(image.size)
            left, top = (image.width - short) // 2, (image.height - short) // 2
            image = image.crop((left, top, left + short, top + short)).resize((side, side), Image.LANCZOS)
            image.save(folder / f"{index:02d}.jpg", quality=85, optimize=True)
        lines.append(f"{subject},{noun},{subject}")
    (ASSETS / "demo" / "real.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
