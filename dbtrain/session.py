"""What stays warm between subjects: the world, the base model, shards and identifiers; and what names a run."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dbtrain.adapters import detach
from dbtrain.batch import Sample, Subject
from dbtrain.config import RunConfig
from dbtrain.data.index import Index
from dbtrain.data.manifest import read_manifest
from dbtrain.data.shards import shard_manifest
from dbtrain.engines.capture import choose_capture, release
from dbtrain.engines.engine import World, plan_batches
from dbtrain.engines.zero import start_world
from dbtrain.errors import StopRequested
from dbtrain.families import FAMILIES, Family, Models, load_models
from dbtrain.families.attention import engage_attention
from dbtrain.families.load import base_digest
from dbtrain.priors import IMPORTED, PriorKey, images_digest, make_priors, prior_key
from dbtrain.ranks import from_first, together
from dbtrain.registry import REGISTRY, recorded_identifiers
from dbtrain.telemetry import Stages

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


@dataclass(frozen=True)
class ClassPriors:
    """A class's prior images, and their VAE moments [n, variants, 2C, h, w] where latents are cached."""

    samples: list[Sample]
    moments: Tensor | None = None


@dataclass
class Session:
    """What stays warm between subjects."""

    config: RunConfig
    out: Path
    world: World
    family: Family
    models: Models
    identifiers: dict[str, str]
    shards: Path | str
    stages: Stages = field(default_factory=Stages)
    quiet: bool = False
    stop: bool = False
    class_priors: dict[tuple[PriorKey, int], ClassPriors] = field(default_factory=dict)
    """The last classes' priors, which their next subjects use again."""
    classes_kept: int = 1
    priors_drawn: bool = False
    """Whether every class's priors are complete, so that a thread beside training need not look (or draw)."""
    index: Index = field(default_factory=lambda: Index((), ()))
    """Where the photos lie: of all subjects, or of those at hand."""
    taken_wait_s: float = 30.0
    """How long a subject that another process trains is waited for; a killed one's lock may take a while to fall."""
    beat: Callable[[str], None] = lambda stage: None
    """Told at every stage and step that this process is alive and at what."""
    opened: Callable[[], object] = lambda: None
    """Told by the first rank when a subject's settings and data are let in and there is work to do for it."""

    @property
    def prior_store(self) -> Path:
        """The folder of the class priors: the run's own, or one that runs share."""
        return Path(self.config.prior.store) if self.config.prior.store else self.out / "priors"

    def start_stages(self) -> Stages:
        """Fresh stage times, for a subject that begins."""
        self.stages = Stages(self.beat)
        return self.stages

    def keep_priors(self, wanted: tuple[PriorKey, int], priors: ClassPriors) -> None:
        """Remember a class's priors, and forget those that were not asked for longest."""
        self.class_priors.pop(wanted, None)
        self.class_priors[wanted] = priors
        while len(self.class_priors) > self.classes_kept:
            del self.class_priors[next(iter(self.class_priors))]

    def say(self, line: str) -> None:
        """One line for the person who watches, from the first rank."""
        if self.world.first and not self.quiet:
            print(line, file=sys.stderr, flush=True)


def open_session(
    config: RunConfig,
    subjects: Sequence[Subject],
    manifest: Path,
    out: Path,
    quiet: bool = False,
    skip_bad: bool = False,
) -> Session:
    """Load the base and shard the photos, once for all subjects; a request to stop is met at once until it returns."""
    session = join_session(config, out, quiet)
    tokenizer = next(iter(session.models.tokenizers.values()))
    registry = Path(config.identifier.registry or out / REGISTRY)

    def shard() -> set[str]:
        index = shard_manifest(manifest, out / "shards", config, session.say, skip_bad, tokenizer, registry)
        return set(index.subjects)

    with session.stages("shard"):
        on_stop(_stop_now)
        stored = from_first(session.world, shard)
        on_stop(lambda *_: setattr(session, "stop", True))
    world = session.world
    session.index = together(world, lambda: Index.load(session.shards, config.data.schemes))
    sound = [subject for subject in subjects if subject.id in stored]
    tokens, seed = config.identifier.tokens, config.seed
    session.identifiers = from_first(world, lambda: recorded_identifiers(registry, tokenizer, sound, tokens, seed))
    return session


def join_session(
    config: RunConfig, out: Path, quiet: bool = False, beat: Callable[[str], None] = lambda stage: None
) -> Session:
    """Load the base for a run whose shards and identifiers another process makes; they are set before training."""
    world, stages = start_world(), Stages(beat)
    plan_batches(config.train.batch, config.train.micro_batch, world.size)
    with stages("load"):
        models = load_base(config, world)
    shards = config.data.shards or out / "shards"
    session = Session(config, out, world, FAMILIES[config.model.family], models, {}, shards, stages, quiet, beat=beat)
    on_stop(lambda *_: setattr(session, "stop", True))
    return session


def on_stop(action: Callable[..., object]) -> None:
    """Nothing; from now on a request to stop (SIGTERM, SIGUSR1) does this."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, action)


def _stop_now(*_: object) -> None:
    raise StopRequested("stopped on request before training; run the same command to go on")


def load_base(config: RunConfig, world: World) -> Models:
    """The base model on this rank's device; where only adapters train, its denoiser in the compute precision."""
    kind = torch.device(world.device).type
    choose_capture(config.engine, kind)  # refuses before anything is loaded
    models = load_models(FAMILIES[config.model.family], config.model).to(torch.device(world.device))
    if kind == "cuda" and config.train.precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # else convolutions round what they multiply to 10 bits
    if config.engine.channels_last:
        models.denoiser.to(memory_format=torch.channels_last)
    models.attention = engage_attention(models.denoiser, config.model.attention, kind, config.train.precision)
    if config.train.method == "lora" and config.train.precision == "bf16":
        models.denoiser.to(torch.bfloat16)
    return models


def subject_config(config: RunConfig, subject: Subject) -> RunConfig:
    """The run's configuration with a subject's overrides."""
    for name, (section, key) in OVERRIDES.items():
        if (value := getattr(subject, name)) is not None:
            part = getattr(config, section).model_copy(update={key: value})
            config = config.model_copy(update={section: part})
    return config if subject.seed is None else config.model_copy(update={"seed": subject.seed})


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
    if config.prior.weight > 0 and config.prior.sampler == IMPORTED:
        key = prior_key(config, session.models, subject.class_noun)
        about["priors"] = images_digest(session.prior_store, key, config.prior.images)
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def data_digest(samples: Sequence[Sample]) -> str:
    """One sha256 of a subject's stored images, in order."""
    return hashlib.sha256(b"".join(hashlib.sha256(sample.image).digest() for sample in samples)).hexdigest()


def restore_base(session: Session) -> None:
    """Make the loaded base what it was before the subject."""
    if session.config.train.method == "lora" and session.config.engine.zero.stage < 3:
        for module in session.models.components(session.family.denoiser_name).values():
            detach(module)
            release(module)
        return
    session.models = load_base(session.config, session.world)


def make_class_priors(manifest: Path, config: RunConfig, store: Path) -> dict[str, int]:
    """Number of images drawn for each class of a manifest, so that the store holds `prior.images` of it."""
    world = start_world()
    family = FAMILIES[config.model.family]
    models = load_base(config, world)
    classes = sorted({subject.class_noun for subject in read_manifest(manifest, config.data.shards is None)})
    return {
        noun: make_priors(
            store, prior_key(config, models, noun), config.prior.images, family, models, world, config.prior.batch
        )
        for noun in classes
    }
