"""Whether a denoiser is computed by fused kernels, and how its pictures lie in memory, as the settings say.

What needs diffusers' classes is imported where it is used: importing all of its transformers takes seconds, which a
process that loads no model would pay for nothing.
"""

import torch
from torch import nn

from dbtrain.settings.config import EngineConfig


def fuses_pointwise(settings: EngineConfig, device_type: str) -> bool:
    """Whether `engine.fused_pointwise` says so. torch.compile fuses more than these, so compiled blocks stay plain."""
    chosen = settings.fused_pointwise
    return chosen == "on" or (chosen == "auto" and device_type == "cuda" and not settings.capture.startswith("compile"))


def fuse(denoiser: nn.Module, settings: EngineConfig, device_type: str) -> None:
    """Put kernels in the place of chains of operators, where `fuses_pointwise`."""
    if fuses_pointwise(settings, device_type):
        from dbtrain.models.fused_pointwise import fuse_pointwise

        fuse_pointwise(denoiser)


def lay_out(denoiser: nn.Module, settings: EngineConfig) -> bool:
    """Whether the convolutions of a denoiser lie with channels last now, as `engine.channels_last` says. `auto`: those
    of a U-Net whose GroupNorms are fused, on a GPU, and which no DeepSpeed flattens."""
    chosen = settings.channels_last
    if chosen == "auto":
        on_gpu = next(denoiser.parameters()).device.type == "cuda"
        chosen = on_gpu and settings.kind != "zero" and _has_fused_norms(denoiser)
    if chosen:
        denoiser.to(memory_format=torch.channels_last)
    return bool(chosen)


def _has_fused_norms(denoiser: nn.Module) -> bool:
    from dbtrain.models.fused_unet import GroupNorm

    return any(isinstance(module, GroupNorm) for module in denoiser.modules())
