"""The contract of a model family: every fact about an architecture, as one row of plain functions and names.

A row is a `Family`. Its file stands in `dbtrain/families/`, its name in the table there. Nothing else in dbtrain asks
of which family a model is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.models.architectures import Architecture
from dbtrain.models.attention import Attention
from dbtrain.objective.noise import Schedule
from dbtrain.settings.config import ModelConfig
from dbtrain.values import Batch, Conditioning

Tokens = tuple[Tensor, ...]
"""Token ids [B, T], one tensor a text encoder."""


@dataclass
class Models:
    """A loaded base model, in pieces.

    text_encoders and tokenizers are keyed by component name (`text_encoder`, `text_encoder_2`). scheduler is the
    diffusers scheduler that the model came with, for sampling; schedule is its noise schedule, for training.
    """

    denoiser: nn.Module
    text_encoders: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    vae: nn.Module
    scheduler: Any
    schedule: Schedule
    source: str
    digests: dict[str, str] = field(default_factory=dict)
    attention: Attention | None = None
    """What computes the denoiser's attention; None until that is chosen."""

    def components(self, denoiser: str) -> dict[str, nn.Module]:
        """The trainable components by their names on disk; denoiser: the name of that component."""
        return {denoiser: self.denoiser, **self.text_encoders}

    def to(self, device: torch.device) -> Models:
        """The same models, moved."""
        for module in (self.denoiser, self.vae, *self.text_encoders.values()):
            module.to(device)
        self.schedule = self.schedule.to(device)
        return self


@dataclass(frozen=True)
class Codec:
    """How pixels become what a denoiser is trained on.

    encode(vae, pixels [B, 3, H, W] in [-1, 1]) -> moments [B, 2C, h, w], float32: mean and log-variance of a Gaussian,
    stacked along channels. scale(vae) -> (scale, shift): the denoiser's latents are (sample - shift) * scale.
    cell: pixels of a side for one cell of the denoiser's grid. channels: C.
    """

    channels: int
    cell: int
    encode: Callable[[nn.Module, Tensor], Tensor]
    scale: Callable[[nn.Module], tuple[float, float]]

    def is_encoded(self, images_BCHW: Tensor) -> bool:
        """Whether images are moments, and not pixels that are still to be encoded."""
        return images_BCHW.shape[1] == 2 * self.channels


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


@dataclass(frozen=True)
class Family:
    """One architecture.

    pipeline: diffusers' pipeline class. denoiser, text_encoders: names of components on disk. components: the classes
    that a component may have, as `library:Class`, by its name on disk. absent: parts of the pipeline that are left out.

    schedule(scheduler, settings) -> the training schedule, and the sampling scheduler that agrees with it.
    tokenize(models, captions) -> Tokens; encode_tokens(text_encoders, tokens) -> Conditioning;
    denoise(denoiser, x_t_BCHW, time_B, conditioning, batch) -> prediction_BCHW.
    samplers: diffusers' scheduler classes for drawing priors, by the name in `prior.sampler`.

    kohya(component, path) -> the name of a layer in kohya's files. regions: class names of the blocks that repeat in
    the denoiser, which are compiled one by one. shapes: published sizes, to count and to time without weights.
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
    kohya: Callable[[str, str], str]
    regions: tuple[str, ...]
    shapes: Mapping[str, Architecture]
    tokenize: Callable[[Models, Sequence[str]], Tokens] = pad_to_length
    absent: Mapping[str, Any] = field(default_factory=dict)
    base_version: str = "unknown"
    """kohya's name of the base (`ss_base_model_version`), by which A1111 and Forge choose what to offer."""


def encode_images(vae: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """Moments [B, 2C, h, w] of a KL autoencoder: mean and clamped log-variance."""
    posterior = vae.encode(pixels_BCHW.to(next(vae.parameters()).dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], 1).float()


def latent_scale(vae: nn.Module) -> tuple[float, float]:
    """(scale, shift) in a KL autoencoder's own configuration."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def is_local(source: str) -> bool:
    """Whether a model source names something on this machine rather than on the hub."""
    return Path(source).exists()
