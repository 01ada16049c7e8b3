"""The contract of a model family: what every architecture must be able to do, as a row of plain functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.models.attention import Attention
from dbtrain.objective.noise import Schedule
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
    """What computes the denoiser's attention, once that is engaged."""

    def components(self, denoiser_name: str = "unet") -> dict[str, nn.Module]:
        """The trainable components by their names on disk."""
        return {denoiser_name: self.denoiser, **self.text_encoders}

    def to(self, device: torch.device) -> Models:
        """The same models, moved."""
        for module in (self.denoiser, self.vae, *self.text_encoders.values()):
            module.to(device)
        self.schedule = self.schedule.to(device)
        return self


@dataclass(frozen=True)
class Family:
    """One architecture: its diffusers pipeline, and the four functions that training needs.

    tokenize(models, captions) -> Tokens; encode_tokens(text_encoders, tokens) -> Conditioning;
    denoise(denoiser, x_t_BCHW, time_B, conditioning, batch) -> prediction_BCHW.
    """

    name: str
    pipeline: str
    denoiser_name: str
    text_components: tuple[str, ...]
    encode_tokens: Callable[[dict[str, nn.Module], Tokens], Conditioning]
    denoise: Callable[[nn.Module, Tensor, Tensor, Conditioning, Batch], Tensor]

    def tokenize(self, models: Models, captions: Sequence[str]) -> Tokens:
        """Token ids of the captions, padded and cut to each text encoder's length."""
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


def encode_images(vae: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """VAE moments [B, 2C, h, w] of pixels in [-1, 1]: mean and clamped log-variance stacked along channels."""
    posterior = vae.encode(pixels_BCHW.to(next(vae.parameters()).dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], 1).float()


def sample_latents(vae: nn.Module, moments_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Latents [B, C, h, w] in the denoiser's scale, drawn from moments with the given standard normal noise."""
    mean, logvar = moments_BCHW.chunk(2, 1)
    scale, shift = latent_scale(vae)
    return (mean + torch.exp(0.5 * logvar) * noise_BCHW - shift) * scale


def latent_scale(vae: nn.Module) -> tuple[float, float]:
    """(scale, shift) of the denoiser's latents: (VAE latent - shift) * scale."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def is_local(source: str) -> bool:
    """Whether a model source names something on this machine rather than on the hub."""
    return Path(source).exists()
