"""What names a training: a subject's own settings, and one digest of all that decides its result."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from dbtrain.models.load import base_digest
from dbtrain.priors.store import IMPORTED, images_digest, prior_key
from dbtrain.results.identity import PHOTOS, Identity, digest_of
from dbtrain.settings.config import RunConfig
from dbtrain.settings.marks import deciding
from dbtrain.subjects.columns import COLUMNS
from dbtrain.training.session import Base, Work
from dbtrain.training.trainables import initial_digest
from dbtrain.values import OWN, Sample, Subject


def subject_config(config: RunConfig, subject: Subject) -> RunConfig:
    """The run's configuration with a subject's overrides."""
    for column in COLUMNS.values():
        value = getattr(subject, column.field)
        if column.setting is not None and value is not None:
            config = config.replaced(column.setting, value)
    return config


def training_identity(
    config: RunConfig, subject: Subject, base: Base, work: Work, instances: Sequence[Sample]
) -> Identity:
    """Everything that decides the result, and one sha256 of it: resuming is allowed only where it agrees."""
    about: dict[str, Any] = {
        "settings": deciding(config),
        "base": base_digest(base.models),
        "subject": subject.id,
        "class": subject.class_noun,
        "identifier": work.identifiers[subject.id],
        "caption": subject.caption,
        "data": data_digest(instances),
    }
    if any(sample.meta.get(OWN) for sample in instances):
        about["captions"] = [sample.caption for sample in instances]
    if config.prior.weight > 0 and config.prior.sampler == IMPORTED:
        key = prior_key(config, base.models, subject.class_noun)
        about["priors"] = images_digest(work.priors, key, config.prior.images)
    if base.upscalers:
        about["upscalers"] = [base_digest(stage.models) for stage in base.upscalers]
    if config.lora.init:
        about["init"] = initial_digest(config)
    about[PHOTOS] = [hashlib.sha256(sample.image).hexdigest() for sample in instances]
    return Identity(digest_of(about), about)


def data_digest(samples: Sequence[Sample]) -> str:
    """One sha256 of a subject's stored images, in order, and of their masks if there are any."""
    parts = [hashlib.sha256(sample.image).digest() for sample in samples]
    if any(sample.mask is not None for sample in samples):
        parts += [b"masks", *(hashlib.sha256(sample.mask or b"").digest() for sample in samples)]
    return hashlib.sha256(b"".join(parts)).hexdigest()
