"""Thumbnails: small JPEG files named by a digest of what they show, so that an image is reduced only once."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

from dbtrain.data.images import open_photo

SIDE = 192
"""Longest side of a thumbnail in pixels. Smaller images keep their size."""
QUALITY = 88
NAME = re.compile(r"([0-9a-f]{16})-(\d{1,3})x(\d{1,3})\.jpg")
FORM = f"jpeg {SIDE} {QUALITY}"
"""How thumbnails are made. It is part of every digest, so a change of it makes all thumbnails anew."""


def put(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all. It may be lost in a power cut: a report can be made again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


class Thumbnails:
    """The thumbnails of one page, in the page's own folder."""

    def __init__(self, folder: Path, fresh: bool = False):
        self.folder = folder
        names = {match[1]: match[0] for name in os.listdir(folder) if (match := NAME.fullmatch(name))}
        self.old = set(names.values())
        self.made = {} if fresh else names
        self.used: set[str] = set()

    def of(self, identity: str, content: Callable[[], bytes | Path]) -> dict[str, str | int]:
        """{"src", "width", "height"} of an image's thumbnail, which is made from `content` if it does not exist yet.

        identity: a text that changes when the image changes. Raises DataError if the content is no image.
        """
        key = hashlib.sha256(f"{FORM}\n{identity}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
        if key not in self.made:
            image, small = open_photo(content()), io.BytesIO()
            image.thumbnail((SIDE, SIDE))
            image.save(small, "JPEG", quality=QUALITY, subsampling=0)
            self.made[key] = f"{key}-{image.width}x{image.height}.jpg"
            put(self.folder / self.made[key], small.getvalue())
        name = self.made[key]
        self.used.add(name)
        match = NAME.fullmatch(name)
        assert match is not None, "only such names are made and listed"
        return {"src": name, "width": int(match[2]), "height": int(match[3])}

    def sweep(self) -> None:
        """Delete the thumbnails in the folder that this page does not show."""
        for name in self.old - self.used:
            (self.folder / name).unlink(missing_ok=True)
