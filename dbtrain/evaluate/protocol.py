"""The evaluation protocol: which pictures a subject is judged by, drawn once and kept, and its evaluation.json.

`dreambooth` is the paper's (arXiv 2208.12242, section 4): 25 prompts for the class, 4 images each. `quick` takes the
prompts, seeds and images of the recipe's samples, which training has drawn already. A picture's name holds a digest of
everything that decides it and it is written whole or not at all, so the same command again draws what is missing.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dbtrain.data.images import open_photo
from dbtrain.data.index import INDEX_NAME, Index
from dbtrain.data.stream import read_samples
from dbtrain.errors import ConfigError, DataError
from dbtrain.evaluate.distances import AUTO
from dbtrain.evaluate.features import EMBEDDED
from dbtrain.evaluate.judge import Judge, Seen, likeness, load_judge, read_images
from dbtrain.evaluate.scores import subject_scores
from dbtrain.evaluate.suspicion import copied, suspicions
from dbtrain.models.family import Family, Models
from dbtrain.models.load import base_digest
from dbtrain.models.sampling import generate, image_seed
from dbtrain.results.finished import finished_config, finished_pipeline
from dbtrain.results.record import finished_record
from dbtrain.settings.config import RunConfig
from dbtrain.storage.atomic import write_file
from dbtrain.subjects.prompts import LIVE_CLASSES, fill, is_live, prompt_set, slug, without_identifier

SCHEMA = 1
RESULT = "evaluation.json"
PICTURES = "evaluation"
BASE_PICTURES = "base"


@dataclass(frozen=True)
class Settings:
    """How to evaluate. None is the protocol's own value.

    protocol: a name in `PROTOCOLS`. images: for each prompt. class_images: of the class prompt without identifier, for
    PRES. identity, clip: encoders by folder, hub id or `embedded`. live: class nouns of live subjects. overrides:
    `a.b=c` settings of the recipe, such as sample.steps. batch: pictures drawn at once, which rounds them. shards:
    folder of the photos, if not where training read them. distance: of DIV, a name in `distances.CHOICES`.
    """

    protocol: str = "quick"
    images: int | None = None
    class_images: int | None = None
    identity: str = EMBEDDED
    clip: str = EMBEDDED
    live: Collection[str] = LIVE_CLASSES
    overrides: tuple[str, ...] = ()
    batch: int = 8
    seed: int = 0
    shards: Path | None = None
    distance: str = AUTO


@dataclass(frozen=True)
class Plan:
    """What a protocol asks of a subject: templates with `{subject}`, images of each, and images of the class prompt."""

    templates: tuple[str, ...]
    images: int
    class_images: int


def _dreambooth(settings: Settings, config: RunConfig, class_noun: str) -> Plan:
    return Plan(prompt_set(class_noun, settings.live), settings.images or 4, settings.class_images or 25)


def _quick(settings: Settings, config: RunConfig, class_noun: str) -> Plan:
    images = settings.images or config.sample.images or 2
    return Plan(tuple(config.sample.prompts), images, settings.class_images or 4)


PROTOCOLS: dict[str, Callable[[Settings, RunConfig, str], Plan]] = {"dreambooth": _dreambooth, "quick": _quick}
"""Every protocol by its name."""


@dataclass(frozen=True)
class Shot:
    """One picture: its row (`tuned`, `class`, `base`, `base_class`), the prompt as drawn and without identifier, the
    numbers of prompt and image, its seed, and its file."""

    row: str
    prompt: str
    plain: str
    number: int
    image: int
    seed: int
    file: Path


def evaluate_finished(
    folder: Path, models: Models, family: Family, settings: Settings, judge: Judge | None = None
) -> dict[str, Any]:
    """The evaluation of one finished subject, which is also written to `folder`/evaluation.json.

    For workers that hold a loaded base: `models` is that base without adapters, on any device, and is left as it was.
    judge: `load_judge` of the settings' encoders and distance, loaded once for many subjects; None loads it now.
    Pictures that are there already, under `folder`/evaluation and in RUN/evaluation/base, are not drawn again; workers
    may share these folders. `read_photos` says where the photos come from. `summary.write_summary(RUN)` makes
    the run's table of what its subjects have.
    Raises DataError for a folder without a finished subject, with a damaged one, without photos, or of another base
    than `models`.
    """
    record, config = finished_record(folder), finished_config(folder, settings.overrides)
    if record["base_digest"] != base_digest(models):
        raise DataError(
            f"{folder}: was trained from another base ({record['base']}) than the one loaded "
            f"({models.source}); load that base"
        )
    if not config.sample.prompts and settings.protocol == "quick":
        raise ConfigError(f"{folder}: sample.prompts is empty, and the quick protocol has no prompts of its own")
    photos = read_photos(folder, record["subject"], config, settings)
    judge = judge or load_judge(settings.identity, settings.clip, models.denoiser.device.type, settings.distance)
    plan = PROTOCOLS[settings.protocol](settings, config, record["class"])
    own, of_base = shots(folder, record, config, plan, settings)
    reuse_samples(folder, record, config, settings, own)
    draw(own, lambda: finished_pipeline(folder, family, models, config), config, settings.batch)
    draw(of_base, lambda: finished_pipeline(None, family, models, config), config, settings.batch)
    found = {**about(record, config, plan, settings), **judged(judge, photos, own, of_base)}
    found["images"] = list_pictures(folder, own, of_base)
    write_file(folder / RESULT, json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False).encode())
    return found


def read_photos(folder: Path, subject: str, config: RunConfig, settings: Settings) -> list[Image.Image]:
    """A subject's photos, upright and reduced to the training resolution, from the shards that it was trained on.

    Those are `settings.shards`, else the ready-made ones of `config.data`, else RUN/shards.
    """
    shards, schemes = settings.shards or config.data.shards or folder.parent.parent / "shards", config.data.schemes
    absent = isinstance(shards, Path) and not shards.is_dir()
    rows = () if absent else _index(shards, tuple(schemes), _stamp(shards)).entries_of(subject)
    if not rows:
        raise DataError(
            f"{shards}: holds no photos of {subject!r}; keep the run folder whole, or name its shards with --shards"
        )
    return [open_photo(sample.image) for sample in read_samples(shards, rows, schemes)]


@lru_cache(1)
def _index(shards: Path | str, schemes: tuple[str, ...], stamp: tuple[int, ...] | None) -> Index:
    """A place's index, loaded once for all its subjects: it tells of every one, and grows with them."""
    return Index.load(shards, schemes)


def _stamp(shards: Path | str) -> tuple[int, ...] | None:
    """What changes with a folder's index; None for an address, whose index is taken not to change meanwhile."""
    try:
        status = Path(shards, INDEX_NAME).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def shots(
    folder: Path, record: dict[str, Any], config: RunConfig, plan: Plan, settings: Settings
) -> tuple[list[Shot], list[Shot]]:
    """The pictures of the subject and those of the base model, prompt by prompt, the class prompt's last.

    A subject's seeds are named by subject, prompt and image; those of the base and of the class prompt by the class, so
    that subjects share the base's pictures and the class prompt's noise is the same before and after tuning.
    """
    noun, identifier = record["class"], record["identifier"]
    weights = {name: digest for name, digest in record["files"].items() if name.endswith(".safetensors")}
    of_class = fill(config.data.class_caption, class_noun=noun)
    texts = [
        (fill(one, identifier=identifier, class_noun=noun), without_identifier(one, noun)) for one in plan.templates
    ]
    base = run_folder(folder) / PICTURES / BASE_PICTURES
    found: dict[str, list[Shot]] = {}
    for row, rows, home, model in (
        ("tuned", texts, folder / PICTURES, weights),
        ("class", [(of_class, of_class)], folder / PICTURES, weights),
        ("base", [(plain, plain) for _, plain in texts], base / slug(noun), {}),
        ("base_class", [(of_class, of_class)], base / slug(noun), {}),
    ):
        count = plan.class_images if row.endswith("class") else plan.images
        name = record["subject"] if row == "tuned" else noun
        found[row] = []
        for number, (prompt, plain) in enumerate(rows):
            for image in range(count):
                seed = _seed(settings, config, name, plain, image)
                file = home / _file(row, plain, image, [record["base_digest"], model, prompt, seed, _sampling(config)])
                found[row].append(Shot(row, prompt, plain, number, image, seed, file))
    return found["tuned"] + found["class"], found["base"] + found["base_class"]


def run_folder(folder: Path) -> Path:
    """The run that a subject's folder is part of; the folder itself where it stands alone."""
    return folder.parent.parent if folder.parent.name == "subjects" else folder


def _seed(settings: Settings, config: RunConfig, name: str, plain: str, image: int) -> int:
    if settings.protocol == "quick":
        return config.sample.seed + image
    return image_seed("evaluate", settings.seed, name, plain, image)


def _sampling(config: RunConfig) -> list[object]:
    return [config.sample.steps, config.sample.guidance, config.data.resolution, config.train.precision]


def _file(row: str, plain: str, image: int, deciding: object) -> str:
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    return f"{row.replace('_', '-')}-{slug(plain)}-{image:02d}-{digest[:16]}.png"


def reuse_samples(
    folder: Path, record: dict[str, Any], config: RunConfig, settings: Settings, own: Sequence[Shot]
) -> None:
    """Take over what training has drawn for the same prompts, seeds and sampling, if it is still what it wrote."""
    trained, digests = finished_config(folder, ()), record.get("samples")
    same = config.sample.model_copy(update={"images": trained.sample.images}) == trained.sample
    if settings.protocol != "quick" or not same or _sampling(config) != _sampling(trained):
        return
    for shot in own:
        drawn = folder / "samples" / "samples" / f"prompt-{shot.number:02d}-image-{shot.image:02d}.png"
        if shot.row != "tuned" or not drawn.is_file() or sound(shot.file):
            continue
        content = drawn.read_bytes()
        if isinstance(digests, dict) and digests.get(drawn.name) == hashlib.sha256(content).hexdigest():
            shot.file.parent.mkdir(parents=True, exist_ok=True)
            write_file(shot.file, content)


def draw(shots: Sequence[Shot], opened: Callable, config: RunConfig, batch: int) -> None:
    """Every picture that is missing or damaged, drawn; nothing is loaded where none is.

    Batches are cut from a whole row and drawn whole, so that a picture's rounding does not depend on what was there.
    """
    rows = [list(row) for _, row in groupby(shots, lambda shot: shot.row)]
    chunks = [row[i : i + batch] for row in rows for i in range(0, len(row), batch)]
    todo = [chunk for chunk in chunks if not all(sound(shot.file) for shot in chunk)]
    if not todo:
        return
    with opened() as pipeline:
        for chunk in todo:
            _draw_chunk(pipeline, chunk, config)


def _draw_chunk(pipeline: Any, chunk: Sequence[Shot], config: RunConfig) -> None:
    sample, prompts, seeds = config.sample, [shot.prompt for shot in chunk], [shot.seed for shot in chunk]
    images = generate(
        pipeline,
        prompts,
        seeds,
        config.data.resolution,
        sample.steps,
        sample.guidance,
        config.train.precision,
        len(chunk),
    )
    for shot, image in zip(chunk, images):
        if not sound(shot.file):
            shot.file.parent.mkdir(parents=True, exist_ok=True)
            write_file(shot.file, partial(image.save, format="PNG"))


def sound(file: Path) -> bool:
    """Whether a picture is there and can be decoded to its end."""
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def judged(judge: Judge, photos: Sequence[Image.Image], own: Sequence[Shot], of_base: Sequence[Shot]) -> dict[str, Any]:
    """Encoders, scores, the base's and the photos' rows, and warnings, as evaluation.json holds them."""
    features = judge.features(photos, _seen(own, "tuned"), [s.file for s in own if s.row == "class"])
    before = judge.features(photos, _seen(of_base, "base"), [s.file for s in of_base if s.row == "base_class"], True)
    rows = {
        "scores": subject_scores(features, "tuned"),
        "base": subject_scores(before, "tuned"),
        "real": subject_scores(features, "real"),
    }
    copies = copied(features, likeness(read_images([s.file for s in own if s.row == "tuned"]), photos))
    shown = {name: {key: score.row() for key, score in row.items()} for name, row in rows.items()}
    return {
        "encoders": judge.names,
        **shown,
        "photos": len(photos),
        "copies": copies,
        "warnings": [asdict(one) for one in suspicions(rows, copies)],
    }


def _seen(shots: Sequence[Shot], row: str) -> Seen:
    chosen = [shot for shot in shots if shot.row == row]
    prompts = [shot.prompt for shot in chosen] if row == "tuned" else None
    return Seen(
        [shot.file for shot in chosen],
        torch.tensor([shot.number for shot in chosen]),
        [shot.plain for shot in chosen],
        prompts,
    )


def about(record: dict[str, Any], config: RunConfig, plan: Plan, settings: Settings) -> dict[str, Any]:
    """Who was judged and by which protocol."""
    noun = record["class"]
    protocol = {
        "name": settings.protocol,
        "superclass": "live" if is_live(noun, settings.live) else "object",
        "prompts": len(plan.templates),
        "images": plan.images,
        "class_images": plan.class_images,
        "class_prompt": fill(config.data.class_caption, class_noun=noun),
        "steps": config.sample.steps,
        "guidance": config.sample.guidance,
        "resolution": config.data.resolution,
        "seed": settings.seed if settings.protocol == "dreambooth" else config.sample.seed,
    }
    return {
        "schema": SCHEMA,
        "subject": record["subject"],
        "class": noun,
        "identifier": record["identifier"],
        "run": record["run"],
        "base_model": record["base"],
        "protocol": protocol,
    }


def list_pictures(folder: Path, own: Sequence[Shot], of_base: Sequence[Shot]) -> list[dict[str, Any]]:
    """The pictures as evaluation.json lists them: file in the subject's folder, prompt, what was told, seed and row.

    prompt is the subject's own, also in the base's row, which was told it without the identifier; row `base` of the
    class prompt is what row `class` was before tuning. The base's files are linked here, so that the folder is whole.
    """
    asked = {(shot.row, shot.number): shot.prompt for shot in own}
    of_row = {"base": "tuned", "base_class": "class"}
    found = []
    for shot in (*own, *of_base):
        here = folder / PICTURES / shot.file.name
        if here != shot.file:
            link(shot.file, here)
        found.append(
            {
                "file": f"{PICTURES}/{here.name}",
                "prompt": asked[of_row.get(shot.row, shot.row), shot.number],
                "told": shot.prompt,
                "seed": shot.seed,
                "row": "base" if shot.row in of_row else shot.row,
            }
        )
    return found


def link(file: Path, here: Path) -> None:
    """Nothing; afterwards `here` is a second name of the file, or a copy where the disk knows no such names.

    What was there before is replaced unless it is the same: the file may have been drawn anew since.
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
