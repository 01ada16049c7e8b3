"""Thumbnails: small JPEG files named after what they show, so that an image is reduced once and never again."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from dbtrain.data.images import open_photo
from dbtrain.errors import DataError

SIDE = 192
"""Longest side of a thumbnail, in pixels; smaller images keep their size."""
QUALITY = 88
NAME = re.compile(r"([0-9a-f]{16})-(\d{1,3})x(\d{1,3})\.jpg")
FORM = f"jpeg {SIDE} {QUALITY}"


def put(path: Path, content: bytes) -> None:
    """Nothing; afterwards `path` holds `content`, whole. Not durable by itself: a report can be made again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


class Thumbnails:
    """The thumbnails of one page, in the page's own folder."""

    def __init__(self, folder: Path, fresh: bool = False):
        self.folder = folder
        found = {match[1]: match[0] for name in os.listdir(folder) if (match := NAME.fullmatch(name))}
        self.old = set(found.values())
        self.there = {} if fresh else found
        self.used: set[str] = set()

    def has(self, identity: str) -> bool:
        """Whether the thumbnail of an image is there already."""
        return self._key(identity) in self.there

    def of(self, identity: str, content: Callable[[], bytes | Path]) -> dict[str, str | int]:
        """{"src", "width", "height"} of an image; `identity` stands for its bytes. DataError if it is no image."""
        key = self._key(identity)
        if key not in self.there:
            self.there[key] = self._make(key, open_photo(content()))
        name = self.there[key]
        self.used.add(name)
        found = NAME.fullmatch(name)
        assert found is not None, "only such names are made and listed"
        return {"src": name, "width": int(found[2]), "height": int(found[3])}

    @staticmethod
    def _key(identity: str) -> str:
        return hashlib.sha256(f"{FORM}\n{identity}".encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _make(self, key: str, image: Image.Image) -> str:
        image.thumbnail((SIDE, SIDE))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=QUALITY, subsampling=0)
        name = f"{key}-{image.width}x{image.height}.jpg"
        put(self.folder / name, out.getvalue())
        return name

    def sweep(self) -> None:
        """Nothing; afterwards only thumbnails of this page are left."""
        for name in self.old - self.used:
            (self.folder / name).unlink(missing_ok=True)


def attempt(make: Callable[[], dict[str, str | int]], notes: list[str], what: str) -> dict[str, str | int] | None:
    """The thumbnail, or None and a note on why there is none."""
    try:
        return make()
    except (DataError, OSError) as error:
        notes.append(f"{what} is not shown: {error}")
        return None
