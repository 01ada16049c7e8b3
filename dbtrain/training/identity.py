"""What names a training: a subject's own settings, and one digest of all that decides its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from dbtrain.models.load import base_digest
from dbtrain.priors.store import IMPORTED, images_digest, prior_key
from dbtrain.settings.config import RunConfig
from dbtrain.training.session import Base, Work
from dbtrain.values import Sample, Subject

IRRELEVANT: dict[str, set[str] | bool] = {
    **dict.fromkeys(("track", "sample", "checkpoint", "publish", "engine"), True),
    "model": {"path", "revision", "variant", "single_file_layout", "attention"},
    "data": {"cache_latents", "cache_text", "shards", "schemes"},
    "train": {"micro_batch", "gradient_checkpointing"},
    "prior": {"store", "batch"},
    "identifier": {"registry"},
}
"""Sections, and keys of sections, that do not decide what is learnt, or for which a digest stands."""
OVERRIDES = {
    "steps": ("train", "steps"),
    "lr": ("train", "lr"),
    "rank": ("lora", "rank"),
    "prior_weight": ("prior", "weight"),
}
"""Section and key of what a subject can have of its own, besides its seed, by the manifest's column."""


def subject_config(config: RunConfig, subject: Subject) -> RunConfig:
    """The run's configuration with a subject's overrides."""
    for name, (section, key) in OVERRIDES.items():
        if (value := getattr(subject, name)) is not None:
            part = getattr(config, section).model_copy(update={key: value})
            config = config.model_copy(update={section: part})
    return config if subject.seed is None else config.model_copy(update={"seed": subject.seed})


def run_digest(config: RunConfig, subject: Subject, base: Base, work: Work, instances: Sequence[Sample]) -> str:
    """One sha256 of everything that decides the result: resuming is allowed only where it agrees."""
    settings = config.model_dump(mode="json", exclude=IRRELEVANT)
    about = {
        "settings": settings,
        "base": base_digest(base.models),
        "subject": subject.id,
        "class": subject.class_noun,
        "identifier": work.identifiers[subject.id],
        "caption": subject.caption,
        "data": data_digest(instances),
    }
    if config.prior.weight > 0 and config.prior.sampler == IMPORTED:
        key = prior_key(config, base.models, subject.class_noun)
        about["priors"] = images_digest(work.priors, key, config.prior.images)
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def data_digest(samples: Sequence[Sample]) -> str:
    """One sha256 of a subject's stored images, in order."""
    return hashlib.sha256(b"".join(hashlib.sha256(sample.image).digest() for sample in samples)).hexdigest()
