"""The contract of a model family: every fact about an architecture, as one row of plain functions and names.

A row is a `Family`. Its file stands in `dbtrain/families/`, its name in the table there. Nothing else in dbtrain asks
of which family a model is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dbtrain.errors import ConfigError
from dbtrain.models.architectures import Architecture
from dbtrain.models.attention import Attention
from dbtrain.models.texts import Texts
from dbtrain.objective.noise import Schedule
from dbtrain.settings.config import ModelConfig, RunConfig
from dbtrain.values import Batch, Conditioning, Parts

Tokens = tuple[Tensor, ...]
"""Token ids [B, T], one tensor a text encoder, and then the masks that a family needs."""


@dataclass
class Models:
    """A loaded base model, in pieces.

    text_encoders and tokenizers are keyed by component name (`text_encoder`, `text_encoder_2`). scheduler is the
    diffusers scheduler that the model came with, for sampling; schedule is its noise schedule, for training. vae: None
    for a denoiser of pixels.
    """

    denoiser: nn.Module
    text_encoders: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    vae: nn.Module | None
    scheduler: Any
    schedule: Schedule
    source: str
    digests: dict[str, str] = field(default_factory=dict)
    attention: Attention | None = None
    """What computes the denoiser's attention; None until that is chosen."""
    told: dict[str, Any] = field(default_factory=dict)
    """What the base's `model_index.json` says to its pipeline, of the names in `Family.told`."""
    texts: Texts | None = None
    """What encodes texts where the text encoders are not kept; `text_encoders` is then empty."""
    load: Callable[[Sequence[str]], dict[str, nn.Module]] | None = None
    """What loads components by name; None where nothing is to come."""
    pending: bool = False
    """Whether the denoiser, its companions and the autoencoder are still to come; they are empty modules then."""
    parts: Callable[[], Parts] | None = None
    """The denoiser's weights, to be read tensor by tensor; None where it was loaded from a single file."""
    guide_scheduler: Any = None
    """The diffusers scheduler in `Family.guide`; None where the denoiser takes no guide."""
    levels: Schedule | None = None
    """The noise levels of the guide, as a table."""
    companions: dict[str, nn.Module] = field(default_factory=dict)
    """The models in `Family.companions`, by name."""
    upscalers: tuple[Models, ...] = ()
    """The models of the stages that enlarge what these draw, in order."""

    def components(self, denoiser: str) -> dict[str, nn.Module]:
        """The trainable components by their names on disk; denoiser: the name of that component."""
        return {denoiser: self.denoiser, **self.text_encoders}

    @property
    def identifying(self) -> Any:
        """The tokenizer in which identifiers are rare: the last one, whose encoder makes most of the token states. The
        encoders before it are CLIP's, which feed SD3 and FLUX.1 little more than a pooled text."""
        return next(reversed(self.tokenizers.values()))

    def to(self, device: torch.device) -> Models:
        """The same models, moved."""
        for module in (self.denoiser, self.vae, *self.companions.values(), *self.text_encoders.values()):
            if module is not None:
                module.to(device)
        self.schedule = self.schedule.to(device)
        self.levels = self.levels and self.levels.to(device)
        for models in self.upscalers:
            models.to(device)
        return self


@dataclass(frozen=True)
class Codec:
    """How pixels become what a denoiser is trained on.

    encode(vae, pixels [B, 3, H, W] in [-1, 1]) -> moments [B, 2C, h, w], float32: mean and log-variance of a Gaussian,
    stacked along channels. scale(vae) -> (scale, shift): the denoiser's latents are (sample - shift) * scale.
    cell: pixels of a side for one cell of the denoiser's grid. multiple: what the pixels of a side must be divisible
    by; a transformer has one image token for each square of this side. channels: C of the published models.
    """

    channels: int
    cell: int
    encode: Callable[[Any, Tensor], Tensor]
    scale: Callable[[Any], tuple[float, float]]
    multiple: int = 8

    def is_encoded(self, images_BCHW: Tensor) -> bool:
        """Whether images are moments, and not pixels that are still to be encoded: RGB has 3 channels, moments have an
        even number of them."""
        return images_BCHW.shape[1] != 3


def pad_to_length(models: Models, captions: Sequence[str]) -> Tokens:
    """Token ids of the captions, padded and cut to each text encoder's own length."""
    return tuple(
        tokenizer(
            list(captions),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in models.tokenizers.values()
    )


class Guide(NamedTuple):
    """How a denoiser that enlarges is shown the small picture.

    scheduler: name on disk of the diffusers scheduler whose table of noise degrades it. enlarged: whether it has the
    size of the large picture (bilinear, corners aligned, as diffusers' pipelines enlarge); else it stays as it is and
    lies on the denoiser's own grid, and the pipeline takes no height and width.
    """

    scheduler: str
    enlarged: bool


class KohyaLayer(NamedTuple):
    """A layer's name in kohya's files. Where that layer holds several of diffusers', one under the other, sizes are the
    shares of its output features that they have, in order, and place is the number of this one."""

    name: str
    place: int = 0
    sizes: tuple[int, ...] = (1,)


def unshifted(scheduler: Any, tokens: int) -> float:
    """1: noise levels are trained as they are drawn."""
    return 1.0


def from_nothing(models: Models, guidance: float) -> str | None:
    """The empty text, where there is a guidance (above 1) to lead away from it."""
    return "" if guidance > 1 else None


def prompt_embeds(told: Conditioning) -> dict[str, Any]:
    """Encoded prompts as most pipelines take them."""
    pooled = {} if told.pooled_BD is None else {"pooled_prompt_embeds": told.pooled_BD}
    return {"prompt_embeds": told.states_BTD, **pooled}


def by_guidance(models: Models, guidance: float) -> dict[str, Any]:
    """The arguments of a pipeline that takes classifier-free guidance and nothing else of its own."""
    return {"guidance_scale": guidance}


def recompute(denoiser: nn.Module, checkpoint: Callable[..., Any]) -> None:
    """Let a denoiser compute its blocks again in backward, in the places that diffusers chose."""
    denoiser.enable_gradient_checkpointing(checkpoint)


@dataclass(frozen=True)
class Family:
    """One architecture.

    pipeline: diffusers' pipeline class. denoiser, text_encoders: names of components on disk. components: the classes
    that a component may have, as `library:Class`, by its name on disk. absent: parts of the pipeline that are left out.
    told: values in the base's `model_index.json` that change how its pipeline samples.

    schedule(scheduler, settings) -> the training schedule, and the sampling scheduler that agrees with it.
    tokenize(models, captions) -> Tokens; encode_tokens(text_encoders, tokens) -> Conditioning;
    denoise(denoiser, x_t_BCHW, time_B, conditioning, batch) -> prediction_BCHW.
    samplers: diffusers' scheduler classes for drawing priors, by their names in `prior.sampler`; there `auto` is the
    model's own.
    shift(scheduler, image tokens) -> the factor by which noise levels are moved in training.
    call(models, guidance) -> arguments of the pipeline's call beside prompts, sizes and steps.
    embeds(conditioning) -> arguments of the pipeline's call in place of prompts; those of what guidance leads away from
    have `negative_` before their names. avoided(models, guidance) -> the text that guidance leads away from where no
    negative prompt is given; None where the pipeline needs none.
    hear(pipeline, texts): for a pipeline that takes no encoded prompts, lets it find them in texts; it is then called
    with prompts. companions: names of models that drawing needs and training does not.
    recompute(denoiser, checkpoint): lets the denoiser's blocks be computed again in backward, by a function such as
    `torch.utils.checkpoint.checkpoint`.

    kohya(component, path) -> a layer in kohya's files; None for a family whose adapters no reader takes by such names.
    regions: class names of the blocks that repeat in the denoiser, which are compiled one by one. shapes: published
    sizes, to count and to time without weights. trains_text: whether diffusers loads adapters of all its text encoders.
    frees_text: whether text encoders go once all texts of a run are encoded.
    negative: whether the pipeline takes a negative prompt. unstackable: layers that no pack can adapt, as in
    `lora.targets`, and why. guide: of a denoiser that enlarges; None of all others.
    also: other pipelines whose bases this one draws with, from text. edm: whether the base's scheduler is one of EDM's.
    base_version: kohya's name of the base (`ss_base_model_version`), by which A1111 and Forge choose what to offer.
    """

    name: str
    pipeline: str
    denoiser: str
    text_encoders: tuple[str, ...]
    components: Mapping[str, tuple[str, ...]]
    schedule: Callable[[Any, ModelConfig], tuple[Schedule, Any]]
    codec: Codec
    encode_tokens: Callable[[dict[str, nn.Module], Tokens], Conditioning]
    denoise: Callable[[nn.Module, Tensor, Tensor, Conditioning, Batch], Tensor]
    samplers: Mapping[str, str]
    kohya: Callable[[str, str], KohyaLayer] | None
    regions: tuple[str, ...]
    shapes: Mapping[str, Architecture]
    tokenize: Callable[[Models, Sequence[str]], Tokens] = pad_to_length
    absent: Mapping[str, Any] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    shift: Callable[[Any, int], float] = unshifted
    call: Callable[[Models, float], dict[str, Any]] = by_guidance
    embeds: Callable[[Conditioning], dict[str, Any]] = prompt_embeds
    avoided: Callable[[Models, float], str | None] = from_nothing
    hear: Callable[[Any, Texts], None] | None = None
    companions: tuple[str, ...] = ()
    recompute: Callable[[nn.Module, Callable[..., Any]], None] = recompute
    trains_text: bool = True
    frees_text: bool = True
    negative: bool = True
    unstackable: Mapping[str, str] = field(default_factory=dict)
    guide: Guide | None = None
    also: tuple[str, ...] = ()
    edm: bool = False
    base_version: str = "unknown"

    def kind_problem(self, index: Mapping[str, Any]) -> str | None:
        """What a base is by its `model_index.json`, where it is none of this family."""
        kind = index.get("_class_name", "model of an unknown kind")
        if kind not in (self.pipeline, *self.also):
            return f"a {kind}"
        scheduler = (index.get("scheduler") or [None, ""])[1] or ""
        return None if ("EDM" in scheduler) == self.edm else f"a {kind} with the scheduler {scheduler}"


def refuse_impossible(family: Family, config: RunConfig) -> None:
    """Raise ConfigError for settings that a family cannot have."""
    prior, train, side, multiple = config.prior, config.train, config.data.resolution, family.codec.multiple
    samplers = ("auto", "imported", *family.samplers)
    rules = [
        (
            prior.weight > 0 and prior.sampler not in samplers,
            f"prior.sampler: {family.name} has no {prior.sampler}; use one of {', '.join(samplers)}",
        ),
        (
            config.publish.kohya and family.kohya is None,
            f"publish.kohya: {family.name} has no names in kohya's files that diffusers reads; set it to false",
        ),
        (
            train.text_encoder and not family.trains_text,
            f"train.text_encoder: diffusers loads no adapter of some text encoder of {family.name}; set it to false",
        ),
        (
            side % multiple != 0,
            f"data.resolution: is {side}, and {family.name} takes multiples of {multiple}",
        ),
    ]
    rules += _guide_rules(family, config)
    rules += [
        (
            config.model.dtype == "bf16" and (train.method == "full" or train.text_encoder),
            "model.dtype: is bf16, but weights that train are kept in fp32; set it to fp32",
        ),
        (
            config.model.dtype == "bf16" and train.precision == "fp32",
            "model.dtype: is bf16, but train.precision is fp32; set both alike",
        ),
    ]
    for wrong, message in rules:
        if wrong:
            raise ConfigError(message)


def low_side(config: RunConfig) -> int:
    """Pixels of a side of the small picture that is enlarged; by default a quarter of `data.resolution`."""
    return config.super.low_resolution or config.data.resolution // 4


def _guide_rules(family: Family, config: RunConfig) -> list[tuple[bool, str]]:
    """(whether settings ask a family that enlarges for what it cannot do, message)."""
    if family.guide is None:
        return []
    side, low, prior = config.data.resolution, low_side(config), config.prior
    return [
        (
            side % low != 0 or low == side,
            f"super.low_resolution: is {low}, and data.resolution = {side} is no larger multiple of it",
        ),
        (
            not family.guide.enlarged and low * family.codec.cell != side,
            f"super.low_resolution: is {low}, and {family.name} enlarges {family.codec.cell} times; leave it out",
        ),
        (
            prior.weight > 0 and prior.sampler != "imported",
            f"prior.weight: {family.name} enlarges and draws no class images; set it to 0, or prior.sampler=imported",
        ),
    ]


def noise_shift(family: Family, models: Models, config: RunConfig) -> float:
    """The factor s by which training moves noise levels; ConfigError where the distribution of t cannot be moved.

    `auto` is 1 for models without a scheduler, which only measurements have.
    """
    tokens = (config.data.resolution // family.codec.multiple) ** 2
    shift = 1.0
    if config.objective.shift != "auto":
        shift = float(config.objective.shift)
    elif models.scheduler is not None:
        shift = family.shift(models.scheduler, tokens)
    if shift != 1 and config.objective.timesteps == "stratified":
        raise ConfigError(
            f"objective.timesteps: stratified cannot be moved by the shift {shift:.3g}; use logit_normal or uniform, "
            "or set objective.shift=1"
        )
    return shift


def encode_texts(
    family: Family, models: Models, text_encoders: dict[str, nn.Module], texts: Sequence[str], device: str
) -> Conditioning:
    """The conditioning of texts that are encoded together, on a device."""
    tokens = tuple(ids.to(device) for ids in family.tokenize(models, texts))
    return family.encode_tokens(text_encoders, tokens)


def encode_images(vae: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """Moments [B, 2C, h, w] of a KL autoencoder: mean and clamped log-variance."""
    posterior = vae.encode(pixels_BCHW.to(next(vae.parameters()).dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], 1).float()


def exactly(x_BCHW: Tensor) -> Tensor:
    """Moments [B, 2C, h, w] of x itself: its log-variance is minus infinity, and exp(-inf / 2) times a number is 0."""
    return torch.cat([x_BCHW, torch.full_like(x_BCHW, -torch.inf)], 1)


def latent_scale(vae: nn.Module) -> tuple[float, float]:
    """(scale, shift) in a KL autoencoder's own configuration."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def is_local(source: str) -> bool:
    """Whether a model source names something on this machine rather than on the hub."""
    return Path(source).exists()
