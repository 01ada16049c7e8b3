"""Gates and norms of a denoiser as one kernel each, forward and backward, in the place of chains of operators: GEGLU,
GroupNorm with SiLU and LayerNorm with the addition before it (`fused_unet`), RMSNorm with rotary embedding
(`fused_rotary`), and norms with modulation and gated additions (`fused_modulation`) by kernels of ours, other RMSNorms
by PyTorch's. Paths and parameters stay as they are."""

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from dbtrain.models.fused_modulation import fuse_modulation
from dbtrain.models.fused_rotary import Norm, fuse_rotary
from dbtrain.models.fused_unet import GroupNorm, fuse_unet
from dbtrain.settings.config import EngineConfig
from dbtrain_kernels.geglu import geglu


class Gate(nn.Module):
    """A `GEGLU` with the same projection."""

    def __init__(self, plain: GEGLU):
        super().__init__()
        self.proj = plain.proj

    def forward(self, x: Tensor) -> Tensor:
        """value * gelu(gate) of the projection's halves."""
        return geglu(self.proj(x))


def fuse_pointwise(denoiser: nn.Module) -> int:
    """The number of gates, norms and embeddings that are one kernel now, and of blocks whose norms take more along."""
    fused = fuse_unet(denoiser) + fuse_rotary(denoiser) + fuse_modulation(denoiser)
    for path, module in [*denoiser.named_modules()]:
        if type(module) is GEGLU:
            denoiser.set_submodule(path, Gate(module))
        elif type(module) is RMSNorm and module.weight is not None and module.bias is None:
            denoiser.set_submodule(path, Norm(module))
        else:
            continue
        fused += 1
    return fused


def fuses_pointwise(settings: EngineConfig, device_type: str) -> bool:
    """Whether `engine.fused_pointwise` says so. torch.compile fuses more than these, so compiled blocks stay plain."""
    chosen = settings.fused_pointwise
    return chosen == "on" or (chosen == "auto" and device_type == "cuda" and not settings.capture.startswith("compile"))


def lay_out(denoiser: nn.Module, settings: EngineConfig) -> bool:
    """Whether the convolutions of a denoiser lie with channels last now, as `engine.channels_last` says. `auto`: those
    of a U-Net whose GroupNorms are `fused_unet`'s on a GPU, and which no DeepSpeed flattens."""
    chosen = settings.channels_last
    if chosen == "auto":
        on_gpu = next(denoiser.parameters()).device.type == "cuda"
        fused = any(isinstance(module, GroupNorm) for module in denoiser.modules())
        chosen = on_gpu and fused and settings.kind != "zero"
    if chosen:
        denoiser.to(memory_format=torch.channels_last)
    return bool(chosen)
