"""Gates and norms of a denoiser as one kernel each, forward and backward, in the place of chains of operators: GEGLU by
a kernel of ours, RMSNorm by PyTorch's. Paths and parameters stay as they are."""

import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

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


class Norm(nn.Module):
    """An `RMSNorm` with the same weight, and no bias. torch.nn.RMSNorm, which FLUX has, is one kernel already."""

    def __init__(self, plain: RMSNorm):
        super().__init__()
        self.weight, self.dim, self.eps = plain.weight, plain.dim, plain.eps

    def forward(self, x: Tensor) -> Tensor:
        """x over the root of its mean square, times the weight, in the weight's dtype."""
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.dim, self.weight, self.eps)
        return F.rms_norm(x.float(), self.dim, None, self.eps).to(self.weight.dtype) * self.weight


def fuse_pointwise(denoiser: nn.Module) -> int:
    """The number of gates and norms that are one kernel now."""
    fused = 0
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
