"""A prior store as its owner sees it: what is in it, whether it is sound, and how own images come into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dbtrain.atomic import held
from dbtrain.config import RunConfig
from dbtrain.data.images import read_photo
from dbtrain.data.index import INDEX_NAME
from dbtrain.data.manifest import subject_from_folder
from dbtrain.data.preflight import preflight
from dbtrain.data.shards import photo_samples, write_shards
from dbtrain.data.stream import verify
from dbtrain.errors import DataError
from dbtrain.priors import (
    BLOCK,
    KEY_FILE,
    LATENTS,
    PriorKey,
    block_folders,
    held_images,
    imported_key,
    prior_sample,
    read_block,
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
        try:
            if _read_key(folder).name != folder.name:
                damage.append(f"{folder / KEY_FILE}: names other images than the folder; take it out")
        except DataError as error:
            damage.append(str(error))
        blocks = sorted(path for path in folder.glob("block-*") if (path / INDEX_NAME).exists())
        damage += [f"{block}: {line.partition(';')[0]}; delete this folder, and the next run draws it anew"
                   for block in blocks for line in verify(block)]
        chain = block_folders(folder)
        damage += [f"{block}: does not follow the blocks before it; the next run fills the gap"
                   for block in blocks if block not in chain and int(block.name.split("-")[1]) > held_images(folder)]
        damage += tensor_damage(folder / LATENTS)
    return damage


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
        known = {sample.meta["source_sha256"] for block in block_folders(place) for sample in read_block(block)}
        digests = {hashlib.sha256(read_photo(path)).hexdigest(): path for path in reversed(subject.images)}
        new = tuple(path for path in subject.images if path in {digests[one] for one in digests.keys() - known})
        write_key(place, key)
        start = held_images(place)
        samples = photo_samples(replace(subject, images=new), config.data.resolution)
        for first in range(start, start + len(new)):
            if first == start or first % BLOCK == 0:
                count = min(BLOCK - first % BLOCK, start + len(new) - first)
                part = (prior_sample(key, first + i, one.image, one.extension, one.meta)
                        for i, one in enumerate(islice(samples, count)))
                write_shards(part, place / f"block-{first:06d}-{count:03d}")
    return len(new), start + len(new)


def _class_folders(store: Path) -> Iterator[Path]:
    if not store.is_dir():
        raise DataError(f"{store}: is no folder; give the folder of a prior store")
    return iter(sorted(path for path in store.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _read_key(folder: Path) -> PriorKey:
    try:
        return PriorKey(**json.loads((folder / KEY_FILE).read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / KEY_FILE}: cannot be read ({error}); delete {folder}, or put it back") from error
