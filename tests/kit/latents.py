"""Latents drawn from moments in one plain line: an oracle that knows nothing of the fused operation."""

import torch
from torch import Tensor

from dbtrain.models.family import Codec


def sample_latents(codec: Codec, vae, moments_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Latents [B, C, h, w] in the denoiser's scale, drawn from moments with the given standard normal noise."""
    mean, logvar = moments_BCHW.chunk(2, 1)
    scale, shift = codec.scale(vae)
    return (mean + torch.exp(0.5 * logvar) * noise_BCHW - shift) * scale
