"""Blocks of diffusers' U-Nets whose GroupNorms take along the SiLU after them and the time embedding before them, whose
LayerNorms take along the addition before them, and that leave pictures in the layout in which they come.

Each class has the name of the one whose place it takes: blocks that are compiled are found by the names of their
classes. Modules become of these classes where they stand, so paths and parameters stay as they are.
"""

import torch
import torch.nn.functional as F
from diffusers.models import attention, resnet
from diffusers.models.transformers import transformer_2d
from torch import Tensor, nn

from dbtrain_kernels import reference
from dbtrain_kernels.group_norm import group_norm
from dbtrain_kernels.residual_norm import residual_norm


class GroupNorm(nn.GroupNorm):
    """A GroupNorm of pictures by our kernel where its parameters are frozen; else by PyTorch's."""

    def forward(self, x: Tensor, silu: bool = False, shift_BC: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The norm of x, or of x + shift; with SiLU if asked."""
        if shift_BC is not None and shift_BC.requires_grad:
            x, shift_BC = x + shift_BC[:, :, None, None], None
        ours = x.dim() == 4 and x.dtype == self.weight.dtype and not self.weight.requires_grad
        norm = group_norm if ours else reference.group_norm
        return norm(x, self.num_groups, self.weight, self.bias, self.eps, silu, shift_BC)


class ResnetBlock2D(resnet.ResnetBlock2D):
    """A residual block with SiLU. `time_embedding_norm` is `default`: the embedding is added; or `scale_shift`."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The block's output, which lies in memory as its input does."""
        x, hidden = input_tensor, self.norm1(input_tensor, silu=True)
        resample = self.upsample or self.downsample
        if resample is not None:
            x, hidden = resample(x), resample(hidden)
        hidden = self.conv1(hidden)
        told = None
        if self.time_emb_proj is not None:
            told = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if told is not None and self.time_embedding_norm == "scale_shift":
            scale, shift = told[:, :, None, None].chunk(2, 1)
            hidden = F.silu(self.norm2(hidden) * (1 + scale) + shift)
        else:
            hidden = self.norm2(hidden, silu=True, shift_BC=told)
        hidden = self.conv2(self.dropout(hidden))
        return ((x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden) / self.output_scale_factor


class Transformer2DModel(transformer_2d.Transformer2DModel):
    """Attention over the pixels of a picture."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        """Diffusers copies tokens, which are pixels with channels last, to channels first."""
        sizes = batch_size, height, width, inner_dim
        if not residual.is_contiguous(memory_format=torch.channels_last):
            return super()._get_output_for_continuous_inputs(hidden_states, residual, *sizes)
        if self.use_linear_projection:
            return self.proj_out(hidden_states).reshape(sizes).permute(0, 3, 1, 2) + residual
        return self.proj_out(hidden_states.reshape(sizes).permute(0, 3, 1, 2)) + residual


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """Attention over pixels, then over the caption, then a feed-forward layer, with a LayerNorm before each."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None, timestep: Tensor | None = None,
        cross_attention_kwargs: dict | None = None, *args: object, **kwargs: object,
    ) -> Tensor:  # fmt: skip
        """The block's output; each addition and the norm after it are one."""
        if cross_attention_kwargs or self._chunk_size is not None:
            rest = (encoder_attention_mask, timestep, cross_attention_kwargs, *args)
            return super().forward(hidden_states, attention_mask, encoder_hidden_states, *rest, **kwargs)
        own = encoder_hidden_states if self.only_cross_attention else None
        x, normal = added_and_normed(self.norm1, hidden_states)
        y = self.attn1(normal, encoder_hidden_states=own, attention_mask=attention_mask)
        x, normal = added_and_normed(self.norm2, x, y)
        y = self.attn2(normal, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        x, normal = added_and_normed(self.norm3, x, y)
        return self.ff(normal) + x


def added_and_normed(norm: nn.LayerNorm, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x + y, its norm), by our kernel where the norm's parameters are frozen. y None: the norm of x."""
    if norm.weight.requires_grad or norm.weight.dtype != x.dtype:
        x = x if y is None else y + x
        return x, norm(x)
    return residual_norm(x, norm.weight, norm.bias, y, eps=norm.eps)


def replacement(module: nn.Module) -> type[nn.Module] | None:
    """The class that a module of a U-Net can be of here, or None."""
    if type(module) is nn.GroupNorm and module.affine:
        return GroupNorm
    if type(module) is transformer_2d.Transformer2DModel:
        return Transformer2DModel
    if type(module) is attention.BasicTransformerBlock:
        norms = [getattr(module, name, None) for name in ("norm1", "norm2", "norm3")]
        affine = all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms)
        plain = module.norm_type == "layer_norm" and module.pos_embed is None and not hasattr(module, "fuser")
        return BasicTransformerBlock if affine and plain else None
    is_plain = type(module) is resnet.ResnetBlock2D and isinstance(module.nonlinearity, nn.SiLU)
    return ResnetBlock2D if is_plain and {type(module.norm1), type(module.norm2)} <= {nn.GroupNorm, GroupNorm} else None


def fuse_unet(denoiser: nn.Module) -> int:
    """The number of norms that take more along than before, or leave the layout."""
    fused = 0
    for module in denoiser.modules():
        kind = replacement(module)
        if kind is not None:
            module.__class__ = kind
            fused += 3 if kind is BasicTransformerBlock else kind is GroupNorm
    return fused
