"""A user's own class images, imported into the store of the priors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dbtrain.data.images import read_photo
from dbtrain.data.shards import write_shards
from dbtrain.errors import DataError
from dbtrain.priors.store import (
    BLOCK,
    IMPORTED,
    all_blocks,
    block_folder,
    held_images,
    imported_key,
    prior_sample,
    read_block,
    write_key,
)
from dbtrain.settings.config import RunConfig
from dbtrain.storage.atomic import held
from dbtrain.subjects.finding import notes, refuse
from dbtrain.subjects.manifest import subject_from_folder
from dbtrain.subjects.preflight import preflight
from dbtrain.subjects.sharding import photo_samples


def import_images(
    folder: Path, class_noun: str, store: Path, config: RunConfig, say: Callable[[str], object] = lambda line: None
) -> tuple[int, int]:
    """(images imported now, images of the class in the store). Photos that the store already has are passed over.

    The photos are checked like those of a subject. If one of them is bad, DataError is raised and nothing is written.
    say: gets a line for each note.
    """
    subject = subject_from_folder(folder, class_noun, say)
    findings = preflight([subject], config)
    for note in notes(findings):
        say(f"note: {note.line()}")
    refuse(findings)
    key = imported_key(config, subject.class_noun)
    place = store / key.name
    with held(place / ".import.lock") as ours:
        if not ours:
            raise DataError(f"{place}: another process imports there; wait for it, then run again")
        blocks = [block_folder(place, block) for block in all_blocks(place)]
        known = {sample.meta["source_sha256"] for block in blocks for sample in read_block(block, IMPORTED)}
        digests = {hashlib.sha256(read_photo(path)).hexdigest(): path for path in reversed(subject.images)}
        wanted = {digests[digest] for digest in digests.keys() - known}
        new = [path for path in subject.images if path in wanted]
        write_key(place, key)
        left = new
        while left:
            block = _free_block(place, len(left))
            photos = photo_samples([replace(subject, images=tuple(left[: len(block)]))], config.data)
            samples = (prior_sample(key, number, photo.image, photo.extension, photo.meta)
                       for number, photo in zip(block, photos))  # fmt: skip
            write_shards(samples, block_folder(place, block))
            left = left[len(block) :]
    return len(new), held_images(place)


def _free_block(folder: Path, images: int) -> range:
    """The next image numbers that no block holds: at most `images` of them, all in one block."""
    first = held_images(folder)
    later = [block.start for block in all_blocks(folder) if block.start > first]
    return range(first, min([first - first % BLOCK + BLOCK, first + images, *later]))
