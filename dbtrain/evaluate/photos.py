"""The photos that a subject's pictures are compared with: read from the shards that the subject was trained on."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import Image

from dbtrain.data.images import open_photo
from dbtrain.data.index import INDEX_NAME, Index
from dbtrain.data.stream import read_samples
from dbtrain.errors import DataError
from dbtrain.settings.config import RunConfig


def read_photos(folder: Path, subject: str, config: RunConfig, shards: Path | None = None) -> list[Image.Image]:
    """A subject's photos, upright and reduced to the training resolution.

    They come from `shards`; if it is None, from the ready-made shards of `config.data`; else from RUN/shards, where RUN
    is the run that the subject's `folder` belongs to. Raises DataError if there are none.
    """
    place, schemes = shards or config.data.shards or folder.parent.parent / "shards", config.data.schemes
    absent = isinstance(place, Path) and not place.is_dir()
    rows = () if absent else _index(place, tuple(schemes), _stamp(place)).entries_of(subject)
    if not rows:
        raise DataError(
            f"{place}: holds no photos of {subject!r}; keep the run folder whole, or name its shards with --shards"
        )
    return [open_photo(sample.image) for sample in read_samples(place, rows, schemes)]


@lru_cache(1)
def _index(place: Path | str, schemes: tuple[str, ...], stamp: tuple[int, ...] | None) -> Index:
    """The index of a folder or an address of shards. It lists all subjects, so it is loaded once for all of them."""
    return Index.load(place, schemes)


def _stamp(place: Path | str) -> tuple[int, ...] | None:
    """Numbers that change with a folder's index; None for an address, whose index is taken as unchanging."""
    try:
        status = Path(place, INDEX_NAME).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
