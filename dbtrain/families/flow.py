"""What the rectified-flow families share: folded moments, the straight schedule, 2x2 packing into tokens.

x_t = (1 - sigma) x0 + sigma eps and the target eps - x0 (arXiv 2403.03206, eq. 13). sigma is the share of noise in
[0, 1]; denoisers are given t = 1000 sigma, or what their family makes of it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.errors import ConfigError
from dbtrain.models.family import KohyaLayer, Models, Tokens
from dbtrain.objective.noise import Schedule, flow_schedule
from dbtrain.settings.config import ModelConfig

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)


def schedule(scheduler: Any, config: ModelConfig) -> tuple[Schedule, Any]:
    """The straight path in 1000 steps, and the model's own scheduler.

    A shift of noise levels is no part of the table: it belongs to the distribution of t, and to sampling.
    """
    name, told = type(scheduler).__name__, scheduler.config
    if name not in SCHEDULERS and told.get("prediction_type") != "flow_prediction":
        raise ConfigError(f"model.path: its scheduler is a {name}, want one of {', '.join(SCHEDULERS)}")
    if config.parameterization not in ("auto", "flow"):
        raise ConfigError(f"model.parameterization: got {config.parameterization}, and a flow model has only `flow`")
    if config.zero_terminal_snr is True:
        raise ConfigError("model.zero_terminal_snr: a flow model ends in pure noise as it is; leave the setting out")
    return flow_schedule(), scheduler


def shift_of(scheduler: Any, tokens: int) -> float:
    """The factor s by which a model's scheduler moves noise levels, sigma' = s sigma / (1 + (s - 1) sigma).

    Static where the scheduler says so (SD3, arXiv 2403.03206, eq. 23); else e^mu, with mu linear in the number of image
    tokens (FLUX). tokens: of one training image.
    """
    told = scheduler.config
    if not told.get("use_dynamic_shifting", False):
        return float(told.get("shift") or told.get("flow_shift", 1.0))
    first, last = told["base_image_seq_len"], told["max_image_seq_len"]
    slope = (told["max_shift"] - told["base_shift"]) / (last - first)
    return math.exp(told["base_shift"] + slope * (tokens - first))


def fold(mean: Tensor, logvar: Tensor, scale: float | Tensor, shift: float | Tensor) -> Tensor:
    """Moments [B, 2C, h, w] of (z - shift) * scale, where z has these moments: a diagonal Gaussian stays one.

    logvar grows by 2 ln scale. The training step then has nothing left to scale.
    """
    scale = torch.as_tensor(scale, dtype=mean.dtype, device=mean.device)
    return torch.cat([(mean - shift) * scale, logvar + 2 * scale.log()], 1).float()


def kl_moments(vae: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """Moments of a KL autoencoder in the denoiser's scale, by the scalars of the autoencoder's configuration."""
    posterior = vae.encode(pixels_BCHW.to(next(vae.parameters()).dtype)).latent_dist
    return fold(posterior.mean, posterior.logvar, vae.config.scaling_factor, vae.config.shift_factor or 0.0)


def kl_means(vae: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """The same without a draw: a log-variance of minus infinity draws exactly the mean, as diffusers' script has it."""
    mean, logvar = kl_moments(vae, pixels_BCHW).chunk(2, 1)
    return torch.cat([mean, torch.full_like(logvar, -math.inf)], 1)


def channel_moments(vae: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """Moments of an autoencoder of films (one frame here), in the denoiser's scale by a mean and a deviation for each
    channel."""
    posterior = vae.encode(pixels_BCHW[:, :, None].to(next(vae.parameters()).dtype)).latent_dist
    mean, logvar = posterior.mean.squeeze(2), posterior.logvar.squeeze(2)
    m, s = (
        torch.tensor(values).view(-1, 1, 1).to(mean) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return fold(mean, logvar, 1 / s, m)


def unscaled(vae: nn.Module) -> tuple[float, float]:
    """(scale, shift) of moments that are in the denoiser's scale already."""
    return 1.0, 0.0


def to_tokens(x_BCHW: Tensor) -> Tensor:
    """Cells of 2x2 latents as tokens [B, h/2 * w/2, 4C], channel-major: (c, dy, dx)."""
    batch, channels, height, width = x_BCHW.shape
    cells = x_BCHW.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, height // 2 * (width // 2), 4 * channels)


def from_tokens(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_tokens`: [B, C, height, width]."""
    batch, _, features = tokens_BLD.shape
    cells = tokens_BLD.view(batch, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(batch, features // 4, height, width)


def grid_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Position ids [height * width, 3] of image tokens: (0, row, column)."""
    ids = like.new_zeros(height, width, 3)
    ids[..., 1] = torch.arange(height, device=like.device)[:, None]
    ids[..., 2] = torch.arange(width, device=like.device)[None, :]
    return ids.view(-1, 3)


def padded(tokenizer: Any, captions: list[str], length: int, **options: Any) -> Any:
    """A tokenizer's ids and mask of captions, padded and cut to a length."""
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt", **options)


def chat_tokens(models: Models, captions: Sequence[str], length: int, thinking: bool) -> Tokens:
    """Ids and mask of each caption as the user's turn of a chat."""
    (tokenizer,) = models.tokenizers.values()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for caption in captions
    ]
    found = padded(tokenizer, texts, length)
    return found.input_ids, found.attention_mask


def call(length: int, models: Models, guidance: float) -> dict[str, Any]:
    """Arguments of a pipeline's call: the guidance scale (1 is none), and as many tokens as in training."""
    return {"guidance_scale": guidance, "max_sequence_length": length}


def call_added(length: int, models: Models, guidance: float) -> dict[str, Any]:
    """The same for a pipeline that adds g (with - without), which is a guidance of 1 + g."""
    return call(length, models, guidance - 1)


def nothing(models: Models, guidance: float) -> None:
    """None: the guidance is a number that the denoiser is told, and leads away from no text."""


def underscored(component: str, path: str) -> KohyaLayer:
    """kohya's name of a layer: diffusers' path with underscores, behind `lora_unet`."""
    return KohyaLayer(f"lora_unet_{path}".replace(".", "_"))
