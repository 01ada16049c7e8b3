"""The evaluation protocol: which pictures a subject is scored by, drawn once and kept, and its evaluation.json.

`dreambooth` is the paper's (arXiv 2208.12242, section 4): 25 prompts for the class, 4 images each. `quick` takes the
prompts, seeds and images of the recipe's samples, which training has drawn already. A picture's file name contains a
digest of everything that decides the picture, and a file is written whole or not at all. So running the same command
again draws only what is missing.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from dbtrain.errors import ConfigError, DataError
from dbtrain.evaluate import RESULT
from dbtrain.evaluate.distances import AUTO
from dbtrain.evaluate.features import EMBEDDED
from dbtrain.evaluate.judge import Judge, Seen, likeness, load_judge, read_images
from dbtrain.evaluate.photos import read_photos
from dbtrain.evaluate.scores import subject_scores
from dbtrain.evaluate.warnings_of import copied, warnings_of
from dbtrain.models.family import Family, Models
from dbtrain.models.load import base_digest
from dbtrain.models.sampling import generate, image_seed
from dbtrain.results.finished import finished_config, finished_pipeline
from dbtrain.results.record import finished_record
from dbtrain.settings.config import RunConfig
from dbtrain.settings.stages import upscalers
from dbtrain.storage.atomic import write_file
from dbtrain.subjects.prompts import LIVE_CLASSES, fill, is_live, prompt_set, slug, without_identifier

SCHEMA = 1
PICTURES = "evaluation"
BASE_PICTURES = "base"


@dataclass(frozen=True)
class Protocol:
    """What is drawn and scored. None stands for the named protocol's own number."""

    protocol: str = "quick"
    """A name in `PROTOCOLS`."""
    images: int | None = None
    """Images for each prompt."""
    class_images: int | None = None
    """Images of the class prompt without identifier, for PRES."""
    identity: str = EMBEDDED
    """Identity encoder: a folder, a hub id or `embedded`."""
    clip: str = EMBEDDED
    """Encoder of pictures and texts, named in the same way."""
    live: Collection[str] = LIVE_CLASSES
    """Class nouns of live subjects; all others are objects."""
    overrides: tuple[str, ...] = ()
    """`a.b=c` settings that replace the recipe's, such as sample.steps."""
    batch: int = 8
    """Pictures drawn at once. It decides how they are rounded."""
    seed: int = 0
    shards: Path | None = None
    """Folder of the photos; None where training read them."""
    distance: str = AUTO
    """Distance of DIV: a name in `distances.CHOICES`."""
    base_pictures: Path | None = None
    """Folder of the base model's pictures, which runs may share; None is RUN/evaluation/base."""


@dataclass(frozen=True)
class WantedPictures:
    """What a subject needs: prompt templates with `{subject}`, images of each, and images of the class prompt."""

    templates: tuple[str, ...]
    images: int
    class_images: int


def _dreambooth(protocol: Protocol, config: RunConfig, class_noun: str) -> WantedPictures:
    return WantedPictures(prompt_set(class_noun, protocol.live), protocol.images or 4, protocol.class_images or 25)


def _quick(protocol: Protocol, config: RunConfig, class_noun: str) -> WantedPictures:
    images = protocol.images or config.sample.images or 2
    return WantedPictures(tuple(config.sample.prompts), images, protocol.class_images or 4)


PROTOCOLS: dict[str, Callable[[Protocol, RunConfig, str], WantedPictures]] = {
    "dreambooth": _dreambooth,
    "quick": _quick,
}
"""Every protocol by its name."""


@dataclass(frozen=True)
class Shot:
    """One picture to draw.

    row: `tuned`, `class`, `base` or `base_class`. prompt: as the model is given it. plain: the prompt without the
    identifier. number, image: of the prompt, and of the image among the prompt's images.
    """

    row: str
    prompt: str
    plain: str
    number: int
    image: int
    seed: int
    file: Path


def evaluate_finished(
    folder: Path, models: Models, family: Family, protocol: Protocol, judge: Judge | None = None
) -> dict[str, Any]:
    """The evaluation of one finished subject, which is also written to `folder`/evaluation.json.

    For workers that hold a loaded base: `models` is that base without adapters, on any device, and is left unchanged.
    judge: `load_judge` of the protocol's encoders and distance, loaded once for many subjects; None loads it now.
    Pictures that exist already, in `folder`/evaluation and in RUN/evaluation/base, are not drawn again; several workers
    may share these folders. `photos.read_photos` says where the photos come from, and `summary.write_summary(RUN)`
    makes the run's table from all subjects.
    Raises DataError if the folder holds no finished subject, if the subject is damaged, has no photos, or was trained
    from another base than `models`.
    """
    record, config, wanted, own, of_base = planned(folder, models, protocol)
    photos = read_photos(folder, record["subject"], config, protocol.shards)
    judge = judge or load_judge(protocol.identity, protocol.clip, models.denoiser.device.type, protocol.distance)
    draw(own, lambda: finished_pipeline(folder, family, models, config), config, protocol.batch)
    draw(of_base, lambda: finished_pipeline(None, family, models, config), config, protocol.batch)
    result = {
        **about(record, config, wanted, protocol),
        **scored(judge, photos, own, of_base),
        "images": list_pictures(folder, own, of_base),
    }
    write_file(folder / RESULT, json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False).encode())
    return result


class Planned(NamedTuple):
    """What a subject's evaluation works on: its record, its settings, and its and the base model's pictures."""

    record: dict[str, Any]
    config: RunConfig
    wanted: WantedPictures
    own: list[Shot]
    of_base: list[Shot]


def planned(folder: Path, models: Models, protocol: Protocol) -> Planned:
    """What `evaluate_finished` is to draw, after training's own samples took their places among it."""
    record, config = finished_record(folder), finished_config(folder, protocol.overrides)
    if record["base_digest"] != base_digest(models):
        raise DataError(
            f"{folder}: was trained from another base ({record['base']}) than the one loaded "
            f"({models.source}); load that base"
        )
    if not config.sample.prompts and protocol.protocol == "quick":
        raise ConfigError(f"{folder}: sample.prompts is empty, and the quick protocol has no prompts of its own")
    wanted = PROTOCOLS[protocol.protocol](protocol, config, record["class"])
    own, of_base = shots(folder, record, config, wanted, protocol)
    reuse_samples(folder, record, config, protocol, own)
    return Planned(record, config, wanted, own, of_base)


def shots(
    folder: Path, record: dict[str, Any], config: RunConfig, wanted: WantedPictures, protocol: Protocol
) -> tuple[list[Shot], list[Shot]]:
    """(the subject's pictures, the base model's), each prompt by prompt, those of the class prompt last.

    A subject's seeds are named by subject, prompt and image. Those of the base and of the class prompt are named by the
    class instead. So subjects share the base's pictures, and the class prompt's noise is the same before and after
    tuning.
    """
    noun, identifier = record["class"], record["identifier"]
    bases = [record["base_digest"], *(stage["base_digest"] for stage in record.get("stages", ()))]
    weights = {name: digest for name, digest in record["files"].items() if name.endswith(".safetensors")}
    of_class = fill(config.data.class_caption, class_noun=noun)
    texts = [
        (fill(template, identifier=identifier, class_noun=noun), without_identifier(template, noun))
        for template in wanted.templates
    ]
    of_run = protocol.base_pictures or run_folder(folder) / PICTURES / BASE_PICTURES
    own_folder, base_folder = folder / PICTURES, of_run / slug(noun)
    by_row: dict[str, list[Shot]] = {}
    for row, prompts, place, model in (
        ("tuned", texts, own_folder, weights),
        ("class", [(of_class, of_class)], own_folder, weights),
        ("base", [(plain, plain) for _, plain in texts], base_folder, {}),
        ("base_class", [(of_class, of_class)], base_folder, {}),
    ):
        count = wanted.class_images if row.endswith("class") else wanted.images
        name = record["subject"] if row == "tuned" else noun
        by_row[row] = []
        for number, (prompt, plain) in enumerate(prompts):
            for image in range(count):
                seed = _seed(protocol, config, name, plain, image)
                file = place / _file(row, plain, image, [*bases, model, prompt, seed, _named(config)])
                by_row[row].append(Shot(row, prompt, plain, number, image, seed, file))
    return by_row["tuned"] + by_row["class"], by_row["base"] + by_row["base_class"]


def run_folder(folder: Path) -> Path:
    """The run that a subject's folder belongs to; the folder itself if it is not in a run's `subjects`."""
    return folder.parent.parent if folder.parent.name == "subjects" else folder


def _seed(protocol: Protocol, config: RunConfig, name: str, plain: str, image: int) -> int:
    if protocol.protocol == "quick":
        return config.sample.seed + image
    return image_seed("evaluate", protocol.seed, name, plain, image)


def sampling(config: RunConfig) -> tuple[int, int, float, str]:
    """What decides a picture beside model, prompt and seed: resolution, steps, guidance and precision."""
    return config.data.resolution, config.sample.steps, config.sample.guidance, config.train.precision


def _named(config: RunConfig) -> list[object]:
    side, steps, guidance, precision = sampling(config)
    stages = [[*_named(stage), stage.super.level] for stage in upscalers(config)]
    return [steps, guidance, side, precision, *stages]


def _file(row: str, plain: str, image: int, deciding: object) -> str:
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    return f"{row.replace('_', '-')}-{slug(plain)}-{image:02d}-{digest[:16]}.png"


def reuse_samples(
    folder: Path, record: dict[str, Any], config: RunConfig, protocol: Protocol, own: Sequence[Shot]
) -> None:
    """Copy the samples that training drew for the same prompts, seeds and sampling, if their digests are unchanged."""
    trained, digests = finished_config(folder, ()), record.get("samples")
    same_sampling = config.sample.model_copy(update={"images": trained.sample.images}) == trained.sample
    if protocol.protocol != "quick" or not same_sampling or _named(config) != _named(trained):
        return
    for shot in own:
        drawn = folder / "samples" / "samples" / f"prompt-{shot.number:02d}-image-{shot.image:02d}.png"
        if shot.row != "tuned" or not drawn.is_file() or sound(shot.file):
            continue
        content = drawn.read_bytes()
        if isinstance(digests, dict) and digests.get(drawn.name) == hashlib.sha256(content).hexdigest():
            shot.file.parent.mkdir(parents=True, exist_ok=True)
            write_file(shot.file, content)


def draw(shots: Sequence[Shot], open_pipeline: Callable, config: RunConfig, batch: int) -> None:
    """Draw every picture that is missing or damaged; load no model if there is none.

    The size of a batch decides how its pictures are rounded. So batches are cut from the whole row, and a batch that
    misses one picture is drawn whole: the pictures then do not depend on which of them were there.
    """
    rows = [list(row) for _, row in groupby(shots, lambda shot: shot.row)]
    chunks = [row[i : i + batch] for row in rows for i in range(0, len(row), batch)]
    incomplete = [chunk for chunk in chunks if not all(sound(shot.file) for shot in chunk)]
    if not incomplete:
        return
    with open_pipeline() as pipeline:
        for chunk in incomplete:
            draw_chunk(pipeline, chunk, config, len(chunk))


def draw_chunk(
    pipeline: Any, chunk: Sequence[Shot], config: RunConfig, batch: int, rows: Sequence[int] | None = None
) -> None:
    """Draw pictures and write those that are missing. rows: the adapter of each; see `generate`."""
    images = generate(
        pipeline,
        [shot.prompt for shot in chunk],
        [shot.seed for shot in chunk],
        *sampling(config),
        batch=batch,
        rows=rows,
    )
    for shot, image in zip(chunk, images):
        if not sound(shot.file):
            shot.file.parent.mkdir(parents=True, exist_ok=True)
            write_file(shot.file, partial(image.save, format="PNG"))


def sound(file: Path) -> bool:
    """Whether a picture exists and can be decoded to its end."""
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def scored(judge: Judge, photos: Sequence[Image.Image], own: Sequence[Shot], of_base: Sequence[Shot]) -> dict[str, Any]:
    """The part of evaluation.json that is measured: encoders, the rows of scores, and warnings."""
    tuned = _seen(own, "tuned")
    features = judge.features(photos, tuned, [shot.file for shot in own if shot.row == "class"])
    base_class = [shot.file for shot in of_base if shot.row == "base_class"]
    before = judge.features(photos, _seen(of_base, "base"), base_class, keep=True)
    rows = {
        "scores": subject_scores(features, "tuned"),
        "base": subject_scores(before, "tuned"),
        "real": subject_scores(features, "real"),
    }
    copies = copied(features, likeness(read_images(tuned.files), photos))
    return {
        "encoders": judge.names,
        **{name: {score: interval.row() for score, interval in row.items()} for name, row in rows.items()},
        "photos": len(photos),
        "copies": copies,
        "warnings": [asdict(warning) for warning in warnings_of(rows, copies)],
    }


def _seen(shots: Sequence[Shot], row: str) -> Seen:
    chosen = [shot for shot in shots if shot.row == row]
    return Seen(
        files=[shot.file for shot in chosen],
        prompt_N=torch.tensor([shot.number for shot in chosen]),
        plain=[shot.plain for shot in chosen],
        prompts=[shot.prompt for shot in chosen] if row == "tuned" else None,
    )


def about(record: dict[str, Any], config: RunConfig, wanted: WantedPictures, protocol: Protocol) -> dict[str, Any]:
    """The part of evaluation.json that says which subject was scored, and by which protocol."""
    noun = record["class"]
    numbers = {
        "name": protocol.protocol,
        "superclass": "live" if is_live(noun, protocol.live) else "object",
        "prompts": len(wanted.templates),
        "images": wanted.images,
        "class_images": wanted.class_images,
        "class_prompt": fill(config.data.class_caption, class_noun=noun),
        "steps": config.sample.steps,
        "guidance": config.sample.guidance,
        "resolution": config.data.resolution,
        "seed": protocol.seed if protocol.protocol == "dreambooth" else config.sample.seed,
    }
    return {
        "schema": SCHEMA,
        "subject": record["subject"],
        "class": noun,
        "identifier": record["identifier"],
        "run": record["run"],
        "base_model": record["base"],
        "protocol": numbers,
    }


def list_pictures(folder: Path, own: Sequence[Shot], of_base: Sequence[Shot]) -> list[dict[str, Any]]:
    """The part of evaluation.json that lists the pictures: file in the subject's folder, prompt, seed and row.

    prompt is the subject's own, also in the base's row; `told` is the prompt that the model was really given. Row
    `base` of the class prompt is what row `class` was before tuning. The base's files are linked into the folder, so
    that it holds all pictures.
    """
    own_prompts = {(shot.row, shot.number): shot.prompt for shot in own}
    own_row = {"base": "tuned", "base_class": "class"}
    pictures = []
    for shot in (*own, *of_base):
        here = folder / PICTURES / shot.file.name
        if here != shot.file:
            link(shot.file, here)
        pictures.append(
            {
                "file": f"{PICTURES}/{here.name}",
                "prompt": own_prompts[own_row.get(shot.row, shot.row), shot.number],
                "told": shot.prompt,
                "seed": shot.seed,
                "row": "base" if shot.row in own_row else shot.row,
            }
        )
    return pictures


def link(file: Path, here: Path) -> None:
    """Make `here` a second name of the file, or a copy where the disk has no hard links.

    An older file at `here` is replaced unless it is the same: the picture may have been drawn anew.
    """
    if here.exists() and filecmp.cmp(file, here, shallow=False):
        return
    here.unlink(missing_ok=True)
    try:
        os.link(file, here)
    except FileExistsError:
        return
    except OSError:
        write_file(here, file.read_bytes())
