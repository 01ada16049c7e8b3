"""What the subjects of a run share: the base that is loaded, the work that is given, and who watches it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dbtrain.data.buckets import Shape
from dbtrain.data.index import Index
from dbtrain.engines.capture import choose_capture, release
from dbtrain.engines.deterministic import choose_algorithms
from dbtrain.engines.engine import BatchPlan, keeps_whole, plan_batches
from dbtrain.engines.kind import resolved_engine
from dbtrain.engines.loss_scale import DTYPES, resolved_precision
from dbtrain.engines.world import World, from_first, start_world, together
from dbtrain.engines.zero import load_in_parts
from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.machine import take_signals
from dbtrain.models.adapters import detach
from dbtrain.models.attention import engage_attention
from dbtrain.models.family import Family, Models, encode_texts, refuse_impossible
from dbtrain.models.forms import fuse, lay_out
from dbtrain.models.load import frozen, load_models, modules_of
from dbtrain.models.quantize import quantize
from dbtrain.models.texts import Group, set_aside
from dbtrain.priors.draw import make_priors
from dbtrain.priors.store import PriorKey, prior_key
from dbtrain.settings.config import RunConfig
from dbtrain.settings.stages import upscalers
from dbtrain.subjects.finding import Finding
from dbtrain.subjects.registry import REGISTRY, recorded_identifiers
from dbtrain.subjects.sharding import shard_subjects
from dbtrain.training.clock import Clock
from dbtrain.training.step import TrainingStep
from dbtrain.training.stopping import STOPS, Stop, stop_now
from dbtrain.values import Batch, Sample, Subject

CLASSES = 8
"""Classes whose priors a pack keeps encoded on the device; the subjects under way keep their own in any case."""


@dataclass(frozen=True)
class ClassPriors:
    """A class's prior images. moments: their VAE moments [n, variants, 2C, h, w] by (height, width) in pixels; empty
    where none are cached."""

    samples: list[Sample]
    moments: Mapping[Shape, Tensor] = field(default_factory=dict)


class PriorCache:
    """The priors of the classes that were used last, by key and number of images. size: most classes kept."""

    def __init__(self, size: int):
        self.size = size
        self.kept: dict[tuple[PriorKey, int], ClassPriors] = {}

    def keep(self, wanted: tuple[PriorKey, int], priors: ClassPriors) -> None:
        """Remember a class's priors, and drop those that were not used for longest."""
        self.kept.pop(wanted, None)
        self.kept[wanted] = priors
        while len(self.kept) > self.size:
            del self.kept[next(iter(self.kept))]


@dataclass(frozen=True)
class Base:
    """A base model, loaded once and used for all subjects of a run."""

    world: World
    family: Family
    models: Models
    settings: RunConfig
    class_priors: PriorCache
    upscalers: tuple[Base, ...] = ()
    """The bases of the stages that enlarge."""

    @classmethod
    def load(cls, settings: RunConfig, world: World, late: bool = False) -> Base:
        """The base model of some settings, and those of its further stages, on this rank's device. late: denoiser and
        autoencoder come with `ready`, and text encoders are loaded only while they encode, unless they train or
        captions are encoded at every step."""
        classes = CLASSES if settings.engine.kind == "packed" else 1
        settings = resolved_precision(settings, torch.device(world.device).type)
        family = FAMILIES[settings.model.family]
        refuse_impossible(family, settings)
        refuse_stages(settings)
        stages = tuple(cls.load(stage, world, late) for stage in upscalers(settings))
        apart = late and family.frees_text and settings.data.cache_text and not settings.train.text_encoder
        models = _load_models(settings, world, apart)
        models.upscalers = tuple(stage.models for stage in stages)
        return cls(world, family, models, settings, PriorCache(classes), stages)

    def with_pack(self, size: int) -> Base:
        """The same bases, for packs of another size."""
        settings = self.settings.replaced("engine.packed.size", size)
        return replace(self, settings=settings, upscalers=tuple(stage.with_pack(size) for stage in self.upscalers))

    def ready(self, groups: Iterable[Group] = ()) -> None:
        """Encode groups of texts, and then load denoiser and autoencoder, if these are still to come. No adapters may
        be on the denoiser, and no step of it be recorded: it leaves the device while texts are encoded."""
        models, device, denoiser, wanted = self.models, self.world.device, self.family.denoiser, [*groups]
        if models.texts is not None and wanted:
            models.texts.forget(wanted)
            if not models.texts.kept.keys() >= {*wanted}:
                with set_aside(models.denoiser, device):
                    models.texts.keep(wanted, device)
        if models.pending:
            models.pending = False
            self._load([name for name in modules_of(self.family, texts=False) if not self.in_parts or name != denoiser])

    def _load(self, names: Sequence[str]) -> None:
        """Load components, and put them where they are used."""
        models, family = self.models, self.family
        assert models.load is not None
        parts = models.load(names)
        models.denoiser, models.vae = parts.get(family.denoiser, models.denoiser), parts.get("vae", models.vae)
        models.companions |= {name: parts[name] for name in family.companions if name in parts}
        if family.denoiser in parts:
            _place(models, self.settings, self.world)
        else:
            models.to(torch.device(self.world.device))

    @property
    def in_parts(self) -> bool:
        """Whether the denoiser comes tensor by tensor, as ZeRO stage 3 shares it, and never whole on all ranks. A U-Net
        comes whole: what computes its attention is proved on its layers."""
        settings = self.settings
        shared = self.world.size > 1 and not keeps_whole(settings.engine) and settings.train.method == "full"
        return shared and self.models.parts is not None and self.family.denoiser != "unet"

    def share(self, plan: BatchPlan) -> None:
        """Load the denoiser in parts, if it is to come so."""
        models, family = self.models, self.family
        if self.in_parts:
            assert models.parts is not None
            module = load_in_parts(models.parts(), self.settings, plan, self.world)
            models.denoiser = frozen(family, {family.denoiser: module})[family.denoiser]
            _attend(models, self.settings, self.world.device)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The denoiser whole on this rank for a while, where it else comes in parts."""
        if not self.in_parts:
            yield
            return
        self._load([self.family.denoiser])
        try:
            yield
        finally:
            self.models.denoiser = nn.Module()

    def reload(self) -> None:
        """Reload the models, replacing the trained ones; those of further stages stay."""
        texts = self.models.texts
        fresh = _load_models(self.settings, self.world, texts is not None)
        fresh.upscalers = self.models.upscalers
        vars(self.models).update(vars(fresh))
        if texts is not None:
            self.models.texts = texts
            self.ready()

    def restore(self) -> None:
        """Make the models what they were before a subject trained on them."""
        if self.settings.train.method != "lora" or not keeps_whole(self.settings.engine):
            self.reload()
            return
        for module in self.models.components(self.family.denoiser).values():
            detach(module)
            release(module)


def refuse_stages(settings: RunConfig) -> None:
    """Raise ConfigError for a stage that cannot follow another, or cannot be what its settings say."""
    for stage in upscalers(settings):
        refuse_impossible(FAMILIES[stage.model.family], stage)
        if FAMILIES[stage.model.family].guide is None:
            raise ConfigError(
                f"stages: {stage.model.family} draws from text alone and enlarges nothing; give one of "
                + ", ".join(name for name in FAMILIES if FAMILIES[name].guide)
            )


def _load_models(settings: RunConfig, world: World, apart: bool) -> Models:
    """The models on a rank's device; apart: as in `load_models`."""
    family = FAMILIES[settings.model.family]
    choose_algorithms(settings.engine)
    choose_capture(settings.engine, torch.device(world.device).type)  # refuses before anything is loaded
    refuse_impossible(family, settings)
    if world.device != "cpu" and settings.train.precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # else convolutions round what they multiply to 10 bits
    models = load_models(family, settings.model, apart)
    if settings.model.quantize != "none":
        models.digests = {**models.digests, "quantize": settings.model.quantize}  # it draws other class images
    if not models.pending:
        _place(models, settings, world)
    return models


def _place(models: Models, settings: RunConfig, world: World) -> None:
    """Move models to a rank's device and choose their attention; where only adapters train, the denoiser gets the
    compute precision."""
    device, family = torch.device(world.device), FAMILIES[settings.model.family]
    models.to(device)
    fuse(models.denoiser, settings.engine, device.type)
    lay_out(models.denoiser, settings.engine)
    _attend(models, settings, world.device)
    if settings.train.method == "lora" and settings.train.precision != "fp32":
        cast(models.denoiser, DTYPES[settings.train.precision])
    quantize(models.denoiser, family, settings.model.quantize)
    _try_attention(models, settings, world.device)


def _attend(models: Models, settings: RunConfig, device: str) -> None:
    choice, kind = settings.model.attention, torch.device(device).type
    models.attention = engage_attention(models.denoiser, choice, kind, settings.train.precision)


def _try_attention(models: Models, settings: RunConfig, device: str) -> None:
    """Let a denoiser whose attention is not proved yet see a small picture, so that what cannot be what was asked for
    is refused before any work. Without a text at hand the first step proves it."""
    family, attention = FAMILIES[settings.model.family], models.attention
    told = next(iter(models.texts.kept.values()), None) if models.texts else None
    if attention is None or not attention.must or family.guide:
        return
    if models.text_encoders:
        told = encode_texts(family, models, models.text_encoders, [""], device)
    if told is not None:
        rows = torch.zeros(1, dtype=torch.long, device=device)
        batch = Batch(rows, rows, rows, rows, torch.zeros(1, 6, device=device))
        step = TrainingStep(family, models, settings, (0, 0), told.to(device))
        with torch.no_grad(), attention.watched():
            step.prediction(batch, torch.zeros(1, family.codec.channels, 16, 16, device=device), rows + 500)


def cast(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Cast a denoiser's weights, but for those that diffusers keeps in fp32, such as the norms of Krea 2."""
    kept = {*(getattr(denoiser, "_keep_in_fp32_modules", None) or ())}
    before = {name: param.data for name, param in denoiser.named_parameters() if kept & {*name.split(".")}}
    denoiser.to(dtype)
    for name, value in before.items():
        denoiser.get_parameter(name).data = value


@dataclass(frozen=True)
class Work:
    """The subjects to train, what is known of them, and where their files are.

    index: the samples of these subjects, and perhaps of others. shards: a folder, or the address of a store.
    priors: the folder of the class images, the run's own or one that runs share. stage: the folder of a further stage
    under a subject's; empty for the first.
    """

    subjects: Sequence[Subject]
    identifiers: Mapping[str, str]
    index: Index
    out: Path
    shards: Path | str
    priors: Path
    stage: str = ""

    @classmethod
    def under(
        cls,
        out: Path,
        settings: RunConfig,
        subjects: Sequence[Subject],
        identifiers: Mapping[str, str],
        index: Index,
    ) -> Work:
        """The work of a run with the output folder `out`."""
        return cls(subjects, identifiers, index, out, _shards(settings, out), prior_folder(settings, out))

    def folder(self, subject: Subject) -> Path:
        """The folder of a subject's results."""
        return self.out / "subjects" / subject.id / self.stage


def prior_folder(settings: RunConfig, out: Path) -> Path:
    """The folder of a run's class images."""
    return Path(settings.prior.store) if settings.prior.store else out / "priors"


def _shards(settings: RunConfig, out: Path) -> Path | str:
    return settings.data.shards or out / "shards"


@dataclass(frozen=True)
class Watch:
    """Output, heartbeat, stop request and clock of a run.

    quiet: print nothing. beat: called with the name of every stage and at every step, to show that this process is
    alive. opened: called by the first rank when a subject's settings and data are sound and there is work to do for it.
    logged: called with a subject's id, the steps made, all its steps and the values of every log line.
    """

    quiet: bool = False
    beat: Callable[[str], None] = lambda stage: None
    opened: Callable[[], object] = lambda: None
    logged: Callable[[str, int, int, Mapping[str, float]], object] = lambda subject, step, steps, values: None
    stop: Stop = field(default_factory=Stop)
    clock: Clock = field(default_factory=Clock)

    def say(self, line: str) -> None:
        """Print a line for the person who watches."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def timed_apart(self) -> Watch:
        """The same watch with a clock of its own, at zero."""
        return replace(self, clock=Clock(self.beat))


def join_run(settings: RunConfig, watch: Watch, subjects: Sequence[Subject] = ()) -> Base:
    """The base for training, whose denoiser `Base.ready` loads. From its return on, signals to stop are kept in
    `watch.stop`. subjects: those of the manifest, where they are known."""
    world = start_world()
    settings, why = resolved_engine(settings, world.size, torch.device(world.device).type, subjects)
    if why and world.first:
        watch.say(f"engine: auto is {why}")
    plan_batches(settings.train.batch, settings.train.micro_batch, world.size)  # refuses before anything is loaded
    with watch.clock.stage("load"):
        base = Base.load(settings, world, late=True)
    watch.stop.listen()
    return base


def open_work(
    base: Base,
    watch: Watch,
    subjects: Sequence[Subject],
    findings: Sequence[Finding],
    out: Path,
    chosen: Sequence[str],
    skip_bad: bool = False,
) -> Work:
    """The work on the subjects of a manifest with the ids `chosen`. The photos of all its subjects are sharded.

    subjects, findings: what `scan_manifest` read. skip_bad: leave subjects with findings out.
    Until this returns, a signal to stop ends the process at once.
    """
    world, settings = base.world, base.settings
    tokenizer = base.models.identifying
    registry = Path(settings.identifier.registry or out / REGISTRY)

    def shard() -> set[str]:
        folder = out / "shards"
        index = shard_subjects(subjects, findings, folder, settings, watch.say, skip_bad, tokenizer, registry)
        return set(index.subjects)

    with watch.clock.stage("shard"):
        take_signals(STOPS, stop_now)
        stored = from_first(world, shard)
        watch.stop.listen()
    sound = {subject.id: subject for subject in subjects if subject.id in stored}
    wanted = [sound[name] for name in chosen if name in sound]
    index = together(world, lambda: Index.load(_shards(settings, out), settings.data.schemes))
    tokens, seed, entered = settings.identifier.tokens, settings.seed, list(sound.values())
    identifiers = from_first(world, lambda: recorded_identifiers(registry, tokenizer, entered, tokens, seed))
    return Work.under(out, settings, wanted, identifiers, index)


def drawn_texts(base: Base, prompts: Iterable[str], guidance: float) -> list[Group]:
    """The groups of texts that drawing prompts asks for."""
    avoided = base.family.avoided(base.models, guidance)
    return [(text,) for text in (*prompts, *([] if avoided is None else [avoided]))]


def make_class_priors(classes: Iterable[str], settings: RunConfig, store: Path) -> dict[str, int]:
    """Number of images drawn for each class noun, so that the store holds `prior.images` of it."""
    base = Base.load(settings.replaced("stages", ()), start_world(), late=True)
    prior, drawn = settings.prior, {}
    keys = {noun: prior_key(settings, base.models, noun) for noun in sorted(set(classes))}
    base.ready(drawn_texts(base, [key.prompt for key in keys.values()], prior.guidance))
    with base.whole():
        for noun, key in keys.items():
            drawn[noun] = make_priors(store, key, prior.images, base.family, base.models, base.world, prior.batch)
    return drawn
