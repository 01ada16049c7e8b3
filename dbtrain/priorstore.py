"""A prior store as its owner sees it: what is in it, whether it is sound, and how own images come into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dbtrain.atomic import held
from dbtrain.config import RunConfig
from dbtrain.data.images import read_photo
from dbtrain.data.manifest import subject_from_folder
from dbtrain.data.preflight import preflight
from dbtrain.data.shards import photo_samples, write_shards
from dbtrain.data.stream import verify
from dbtrain.errors import DataError
from dbtrain.priors import (
    BLOCK,
    IMPORTED,
    KEY_FILE,
    LATENTS,
    PriorKey,
    all_blocks,
    block_folder,
    held_images,
    imported_key,
    prior_sample,
    read_block,
    remedy,
    write_key,
)
from dbtrain.proved import tensor_damage


def list_store(store: Path) -> list[dict[str, Any]]:
    """One mapping for each class folder: its key, number of images, encoded groups and size in bytes."""
    rows = []
    for folder in _class_folders(store):
        files = [path for path in folder.rglob("*") if path.is_file()]
        rows.append(
            {
                "folder": folder.name,
                **asdict(_read_key(folder)),
                "images": held_images(folder),
                "encoded_groups": len(list((folder / LATENTS).glob("*.json"))),
                "bytes": sum(path.stat().st_size for path in files),
            }
        )
    return rows


def store_damage(store: Path) -> list[str]:
    """One line for everything in a store that does not verify: keys, blocks, encoded images. Empty means sound."""
    damage = []
    for folder in _class_folders(store):
        sampler = ""
        try:
            key = _read_key(folder)
            sampler = key.sampler
            if key.name != folder.name:
                damage.append(f"{folder / KEY_FILE}: names other images than the folder; take it out")
        except DataError as error:
            damage.append(str(error))
        damage += _block_damage(folder, sampler) + tensor_damage(folder / LATENTS)
    return damage


def _block_damage(folder: Path, sampler: str) -> list[str]:
    """One line for each defect of a class's blocks, and for each block that nothing leads up to."""
    blocks, held_there = all_blocks(folder), held_images(folder)
    places = [block_folder(folder, block) for block in blocks]
    damage = [f"{place}: {line.partition(';')[0]}; {remedy(sampler)}" for place in places for line in verify(place)]
    filled = "`dbtrain prior import` of the lost images" if sampler == IMPORTED else "the next run"
    apart = [place for block, place in zip(blocks, places) if block.start > held_there]
    return damage + [f"{place}: does not follow the blocks before it; {filled} fills the gap" for place in apart]


def import_images(folder: Path, class_noun: str, store: Path, config: RunConfig) -> tuple[int, int]:
    """(images brought in, images of the class now there); photos that are there already are passed over.

    The photos are checked as a subject's are; nothing is written if one of them is bad.
    """
    subject = subject_from_folder(folder, class_noun)
    findings = preflight([subject], config)
    if findings:
        raise DataError("\n".join(finding.line() for finding in findings))
    key = imported_key(config, subject.class_noun)
    place = store / key.name
    with held(place / ".import.lock") as ours:
        if not ours:
            raise DataError(f"{place}: another process imports there; wait for it, then run again")
        blocks = [block_folder(place, block) for block in all_blocks(place)]
        known = {sample.meta["source_sha256"] for block in blocks for sample in read_block(block, IMPORTED)}
        digests = {hashlib.sha256(read_photo(path)).hexdigest(): path for path in reversed(subject.images)}
        wanted = {digests[one] for one in digests.keys() - known}
        new = [path for path in subject.images if path in wanted]
        write_key(place, key)
        left = new
        while left:
            block = _free_block(place, len(left))
            photos = photo_samples(replace(subject, images=tuple(left[: len(block)])), config.data.resolution)
            samples = (prior_sample(key, number, one.image, one.extension, one.meta)
                       for number, one in zip(block, photos))  # fmt: skip
            write_shards(samples, block_folder(place, block))
            left = left[len(block) :]
    return len(new), held_images(place)


def _free_block(folder: Path, images: int) -> range:
    """Numbers for at most so many further images: the first that no block holds, in one block."""
    first = held_images(folder)
    later = [block.start for block in all_blocks(folder) if block.start > first]
    return range(first, min([first - first % BLOCK + BLOCK, first + images, *later]))


def _class_folders(store: Path) -> Iterator[Path]:
    if not store.is_dir():
        raise DataError(f"{store}: is no folder; give the folder of a prior store")
    return iter(sorted(path for path in store.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _read_key(folder: Path) -> PriorKey:
    try:
        return PriorKey(**json.loads((folder / KEY_FILE).read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / KEY_FILE}: cannot be read ({error}); delete {folder}, or put it back") from error
