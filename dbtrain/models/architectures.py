"""The published shapes of base models, to count and to time without their weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Architecture:
    """A U-Net's configuration, its family, the latents and captions it takes in training, and their sizes."""

    family: str
    unet: dict[str, Any]
    latent_side: int
    channels: int = 4
    tokens: int = 77
    pooled: int | None = None

    @property
    def width(self) -> int:
        """Features of a token state."""
        return self.unet["cross_attention_dim"]


ARCHITECTURES = {
    "sd15": Architecture(
        "sd",
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        latent_side=64,
    ),
    "sdxl": Architecture(
        "sdxl",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2, 10),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        latent_side=128,
        pooled=1280,
    ),
}
"""Stable Diffusion 1.5 at 512 px and XL at 1024 px (the `unet/config.json` of their published repositories)."""


def blank_denoiser(name: str, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A frozen U-Net of an architecture: random weights, or shapes alone on the `meta` device."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, **ARCHITECTURES[name].unet)
    return unet.to(dtype).requires_grad_(False)
