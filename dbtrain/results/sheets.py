"""Sample images of a subject: a captioned sheet, and each image alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from dbtrain.models.sampling import SMALL
from dbtrain.storage.atomic import write_file


def grid(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[str] | None = None, cell: int | None = None
) -> Image.Image:
    """A sheet of image rows on white, each under its caption. cell: an image's side in pixels; None: the first's."""
    cell = cell or rows[0][0].width
    gap, header = 4, 16 if captions else 0
    width = max(len(row) for row in rows) * (cell + gap) + gap
    sheet = Image.new("RGB", (width, len(rows) * (cell + gap + header) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = gap + i * (cell + gap + header)
        if captions:
            pen.text((gap, top + 1), captions[i][: width // 6], fill="black")
        for j, image in enumerate(row):
            sheet.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (gap + j * (cell + gap), top + header))
    return sheet


def publish_sheet(folder: Path, rows: Sequence[Sequence[Image.Image]], prompts: Sequence[str], name: str) -> Path:
    """The path of the captioned sheet `name`.png. Each image also lies alone in `samples/name`, and no other image; and
    what the first of several stages drew for it, in `samples/name-small`."""
    images = {f"prompt-{i:02d}-image-{j:02d}.png": image for i, row in enumerate(rows) for j, image in enumerate(row)}
    small = {file: image.info[SMALL] for file, image in images.items() if SMALL in image.info}
    for beside, shown in ((name, images), (f"{name}-small", small)):
        separate = folder / "samples" / beside
        if shown:
            separate.mkdir(parents=True, exist_ok=True)
        for file, image in shown.items():
            save_png(separate / file, image)
        for single in separate.glob("prompt-*-image-*.png"):
            if single.name not in shown:
                single.unlink()
    path = folder / f"{name}.png"
    save_png(path, grid(rows, prompts, cell=max(128, rows[0][0].width)))
    return path


def save_png(path: Path, image: Image.Image) -> None:
    """Write an image, whole or not at all."""
    write_file(path, lambda file: image.save(file, "PNG"))
