"""What stays warm between subjects: the world, the base model, shards and identifiers; and what names a run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dbtrain.data.index import Index
from dbtrain.engines.capture import choose_capture, release
from dbtrain.engines.deterministic import choose_algorithms
from dbtrain.engines.engine import plan_batches
from dbtrain.engines.world import World, from_first, start_world, together
from dbtrain.errors import StopRequested
from dbtrain.families import FAMILIES
from dbtrain.models.adapters import detach
from dbtrain.models.attention import engage_attention
from dbtrain.models.family import Family, Models
from dbtrain.models.load import load_models
from dbtrain.priors.draw import make_priors
from dbtrain.priors.store import PriorKey, prior_key
from dbtrain.settings.config import RunConfig
from dbtrain.subjects.manifest import read_manifest
from dbtrain.subjects.registry import REGISTRY, recorded_identifiers
from dbtrain.subjects.sharding import shard_manifest
from dbtrain.training.telemetry import Stages
from dbtrain.values import Sample, Subject


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
    choose_algorithms(config.engine)
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


def restore_base(session: Session) -> None:
    """Make the loaded base what it was before the subject."""
    if session.config.train.method == "lora" and session.config.engine.zero.stage < 3:
        for module in session.models.components(session.family.denoiser).values():
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
