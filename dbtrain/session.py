"""What stays warm between subjects: the world, the base model, shards and identifiers; and what names a run."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dbtrain.adapters import detach
from dbtrain.batch import Sample, Subject
from dbtrain.config import RunConfig
from dbtrain.data.manifest import read_manifest
from dbtrain.data.shards import shard_manifest
from dbtrain.engines.engine import World, plan_batches
from dbtrain.engines.zero import start_world
from dbtrain.families import FAMILIES, Family, Models, load_models
from dbtrain.families.attention import engage_attention
from dbtrain.families.load import base_digest
from dbtrain.identifiers import allocate
from dbtrain.priors import PriorKey, make_priors, prior_key
from dbtrain.telemetry import Stages

IRRELEVANT: dict[str, set[str] | bool] = {
    **dict.fromkeys(("track", "sample", "checkpoint", "publish", "engine"), True),
    "model": {"path", "revision", "variant", "single_file_layout", "attention"},
    "data": {"cache_latents", "cache_text"},
    "train": {"micro_batch", "gradient_checkpointing"},
    "prior": {"store", "batch"},
}
"""Sections, and keys of sections, that do not decide what is learnt, or for which a digest stands."""


@dataclass
class Session:
    """What stays warm between subjects."""

    config: RunConfig
    out: Path
    world: World
    family: Family
    models: Models
    identifiers: dict[str, str]
    shards: Path
    stages: Stages = field(default_factory=Stages)
    quiet: bool = False
    stop: bool = False
    encoded_priors: dict[tuple[PriorKey, int], Tensor] = field(default_factory=dict)
    """Moments of the last class's priors, which its next subject uses again."""

    def say(self, line: str) -> None:
        """One line for the person who watches, from the first rank."""
        if self.world.first and not self.quiet:
            print(line, file=sys.stderr, flush=True)


def open_session(
    config: RunConfig, subjects: Sequence[Subject], manifest: Path, out: Path, quiet: bool = False
) -> Session:
    """Load the base and shard the photos, once for all subjects."""
    world, stages = start_world(), Stages()
    plan_batches(config.train.batch, config.train.micro_batch, world.size)
    family = FAMILIES[config.model.family]
    with stages("load"):
        models = load_base(config, world)
    shards = out / "shards"
    with stages("shard"):
        if world.first:
            shard_manifest(manifest, shards, config, lambda line: None if quiet else print(line, file=sys.stderr))
        dist.barrier()
    tokenizer = next(iter(models.tokenizers.values()))
    identifiers = allocate(tokenizer, subjects, config.identifier.tokens, config.seed)
    session = Session(config, out, world, family, models, identifiers, shards, stages, quiet)
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, lambda *_: setattr(session, "stop", True))
    return session


def load_base(config: RunConfig, world: World) -> Models:
    """The base model on this rank's device; where only adapters train, its denoiser in the compute precision."""
    models = load_models(FAMILIES[config.model.family], config.model).to(torch.device(world.device))
    engage_attention(models.denoiser, config.model.attention, torch.device(world.device).type)
    if config.train.method == "lora" and config.train.precision == "bf16":
        models.denoiser.to(torch.bfloat16)
    return models


def subject_config(config: RunConfig, subject: Subject) -> RunConfig:
    """The run's configuration with a subject's overrides."""
    train = {key: value for key in ("steps", "lr") if (value := getattr(subject, key)) is not None}
    seed = {} if subject.seed is None else {"seed": subject.seed}
    return config.model_copy(update={"train": config.train.model_copy(update=train), **seed})


def run_digest(config: RunConfig, subject: Subject, session: Session, instances: Sequence[Sample]) -> str:
    """One sha256 of everything that decides the result: resuming is allowed only where it agrees."""
    settings = config.model_dump(mode="json", exclude=IRRELEVANT)
    about = {
        "settings": settings,
        "base": base_digest(session.models),
        "subject": subject.id,
        "class": subject.class_noun,
        "identifier": session.identifiers[subject.id],
        "caption": subject.caption,
        "data": data_digest(instances),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def data_digest(samples: Sequence[Sample]) -> str:
    """One sha256 of a subject's stored images, in order."""
    return hashlib.sha256(b"".join(hashlib.sha256(sample.image).digest() for sample in samples)).hexdigest()


def restore_base(session: Session) -> None:
    """Make the loaded base what it was before the subject."""
    if session.config.train.method == "lora" and session.config.engine.zero.stage < 3:
        for module in session.models.components(session.family.denoiser_name).values():
            detach(module)
        return
    session.models = load_base(session.config, session.world)


def make_class_priors(manifest: Path, config: RunConfig, store: Path) -> dict[str, int]:
    """Number of images drawn for each class of a manifest, so that the store holds `prior.images` of it."""
    world = start_world()
    family = FAMILIES[config.model.family]
    models = load_base(config, world)
    classes = sorted({subject.class_noun for subject in read_manifest(manifest)})
    return {
        noun: make_priors(
            store, prior_key(config, models, noun), config.prior.images, family, models, world, config.prior.batch
        )
        for noun in classes
    }
