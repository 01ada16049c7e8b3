"""Gates and norms of a denoiser as one kernel each, forward and backward, in the place of chains of operators: GEGLU,
SwiGLU, GroupNorm with SiLU and LayerNorm with the addition before it (`fused_unet`), RMSNorm with rotary embedding
(`fused_rotary`), and norms with modulation and gated additions (`fused_modulation`) by kernels of ours, other RMSNorms
by PyTorch's. Paths and parameters stay as they are."""

from diffusers.models import attention
from diffusers.models.activations import GEGLU
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import (
    transformer_flux2,
    transformer_ideogram4,
    transformer_krea2,
    transformer_z_image,
)
from torch import Tensor, nn

from dbtrain.models.fused_modulation import fuse_modulation
from dbtrain.models.fused_rotary import Norm, fuse_rotary
from dbtrain.models.fused_unet import fuse_unet
from dbtrain_kernels.geglu import geglu
from dbtrain_kernels.swiglu import swiglu


class Gate(nn.Module):
    """A `GEGLU` with the same projection."""

    def __init__(self, plain: GEGLU):
        super().__init__()
        self.proj = plain.proj

    def forward(self, x: Tensor) -> Tensor:
        """value * gelu(gate) of the projection's halves."""
        return geglu(self.proj(x))


class FeedForward(transformer_z_image.FeedForward):
    """Z-Image's feed-forward layer."""

    def _forward_silu_gating(self, x1: Tensor, x3: Tensor) -> Tensor:
        return swiglu(x1, x3)


class LuminaFeedForward(attention.LuminaFeedForward):
    """Lumina-Image's feed-forward layer."""

    def forward(self, x: Tensor) -> Tensor:
        """The gated values, projected."""
        return self.linear_2(swiglu(self.linear_1(x), self.linear_3(x)))


class Ideogram4MLP(transformer_ideogram4.Ideogram4MLP):
    """Ideogram 4's feed-forward layer."""

    def forward(self, x: Tensor) -> Tensor:
        """The gated values, projected."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Krea2SwiGLU(transformer_krea2.Krea2SwiGLU):
    """Krea 2's feed-forward layer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The gated values, projected."""
        return self.down(swiglu(self.gate(hidden_states), self.up(hidden_states)))


class Flux2SwiGLU(transformer_flux2.Flux2SwiGLU):
    """FLUX.2's gate: the first half of a projection."""

    def forward(self, x: Tensor) -> Tensor:
        """The gated half."""
        return swiglu(*x.chunk(2, -1))


GATES = {kind.__base__: kind for kind in (FeedForward, LuminaFeedForward, Ideogram4MLP, Krea2SwiGLU, Flux2SwiGLU)}
"""Layers with a SwiGLU, by those of diffusers whose places they take. (diffusers 0.42)"""


def fuse_pointwise(denoiser: nn.Module) -> int:
    """The number of gates, norms and embeddings that are one kernel now, and of blocks whose norms take more along."""
    fused = fuse_unet(denoiser) + fuse_rotary(denoiser) + fuse_modulation(denoiser)
    for path, module in [*denoiser.named_modules()]:
        if type(module) is GEGLU:
            denoiser.set_submodule(path, Gate(module))
        elif type(module) is RMSNorm and module.weight is not None and module.bias is None:
            denoiser.set_submodule(path, Norm(module))
        elif type(module) in GATES:
            module.__class__ = GATES[type(module)]
        else:
            continue
        fused += 1
    return fused
