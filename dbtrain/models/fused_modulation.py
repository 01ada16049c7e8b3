"""Blocks of transformers whose norms take along the modulation after them, and the gated addition before them.

Each class has the name of the one whose place it takes, its parameters and its arguments: blocks that are compiled are
found by the names of their classes. A block that is told of more than one modulation for all tokens of a sample is
diffusers' own. (diffusers 0.42)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models import attention
from diffusers.models.transformers import (
    transformer_chroma,
    transformer_flux,
    transformer_flux2,
    transformer_ideogram4,
    transformer_krea2,
    transformer_lumina2,
    transformer_qwenimage,
    transformer_z_image,
)
from torch import Tensor, nn

from dbtrain_kernels.residual_norm import residual_norm

Told = dict[str, Any] | None
"""What a block tells its attention beside tokens and places."""


def by_token(factors: Tensor | None) -> Tensor | None:
    """Factors [B, D] as [B, 1, D], to be used on tokens; others as they are."""
    return factors[:, None] if factors is not None and factors.dim() == 2 else factors


def added(
    x: Tensor, norm: Any, scale: Tensor | None = None, shift: Tensor | None = None, y: Tensor | None = None,
    gate: Tensor | None = None, norm_of_y: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x + gate * y, what `norm` makes of it, times 1 + scale, plus shift); y by `norm_of_y`, an RMSNorm, first. The
    factors are [B, D] or [B, 1, D]; None leaves one out."""
    scale, shift, gate = map(by_token, (scale, shift, gate))
    if norm_of_y is not None:
        gate = norm_of_y.weight if gate is None else norm_of_y.weight * gate
    y_eps = None if norm_of_y is None else norm_of_y.eps
    if isinstance(norm, nn.LayerNorm):  # without a weight, so all of its scale is the modulation
        return residual_norm(x, scale, shift, y, gate, norm.eps, y_eps, True, True)
    weight = norm.weight + 1.0 if isinstance(norm, transformer_krea2.Krea2RMSNorm) else norm.weight
    scale = weight if scale is None else torch.addcmul(weight, weight, scale)
    return residual_norm(x, scale, shift, y, gate, norm.eps, y_eps, False, False)


def clipped(x: Tensor) -> Tensor:
    """x, of fp16 within its range."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class Stream:
    """Tokens of one modulation: shift, scale, gate of attention, and of a feed-forward layer where it is apart. normal:
    what attention reads."""

    def __init__(self, x: Tensor, modulation: Sequence[Tensor], norm: Any):
        shift, scale, *self.rest = map(by_token, modulation)
        self.x, self.normal = added(x, norm, scale, shift)

    def end(self, y: Tensor) -> Tensor:
        """x + gate * y."""
        return clipped(torch.addcmul(self.x, self.rest[0], y))

    def feed(self, y: Tensor, norm: Any, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """The tokens after attention's output y and the feed-forward layer."""
        gate, shift, scale, last = self.rest
        x, normal = added(self.x, norm, scale, shift, y, gate)
        return clipped(torch.addcmul(x, last, layer(normal)))


def two_streams(block: Any, x: Tensor, c: Tensor, of_x: Any, of_c: Any, **told: Any) -> tuple[Tensor, Tensor]:
    """(captions, pictures) after a block of FLUX, whose norms are diffusers' LayerNorms, or modules that have one."""
    norms = [getattr(norm, "norm", norm) for norm in (block.norm1, block.norm1_context)]
    pictures, captions = Stream(x, of_x, norms[0]), Stream(c, of_c, norms[1])
    y, z = block.attn(hidden_states=pictures.normal, encoder_hidden_states=captions.normal, **told)
    return captions.feed(z, block.norm2_context, block.ff_context), pictures.feed(y, block.norm2, block.ff)


def one_stream(block: Any, x: Tensor, modulation: Any, **told: Any) -> Tensor:
    """The tokens after a block of FLUX.1 whose attention and feed-forward layer read one input."""
    stream = Stream(x, modulation, block.norm.norm)
    wide = block.act_mlp(block.proj_mlp(stream.normal))
    return stream.end(block.proj_out(torch.cat([block.attn(hidden_states=stream.normal, **told), wide], 2)))


def between_norms(
    x: Tensor, modulation: Sequence[Tensor] | None, norms: Sequence[Any], attend: Callable[[Tensor], Tensor],
    feed: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """The tokens after a block with an RMSNorm before and after attention and the feed-forward layer. modulation: scale
    and gate, before its tanh, of both; None where the block has none."""
    scale, gate, later, last = (None,) * 4 if modulation is None else modulation
    gate, last = (None if one is None else one.tanh() for one in (gate, last))
    x, normal = added(x, norms[0], scale)
    x, normal = added(x, norms[2], later, None, attend(normal), gate, norms[1])
    y = norms[3](feed(normal))
    return x + y if last is None else torch.addcmul(x, by_token(last), y)


class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):
    """FLUX.1's two streams."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None,
        joint_attention_kwargs: Told = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(captions, pictures)."""
        if joint_attention_kwargs:
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        own = (norm.linear(norm.silu(temb)).chunk(6, 1) for norm in (self.norm1, self.norm1_context))
        return two_streams(self, hidden_states, encoder_hidden_states, *own, image_rotary_emb=image_rotary_emb)


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """FLUX.1's one stream of both."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None,
        joint_attention_kwargs: Told = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(captions, pictures)."""
        tokens, told = encoder_hidden_states.shape[1], joint_attention_kwargs or {}
        modulation = self.norm.linear(self.norm.silu(temb)).chunk(3, 1)
        x = joined(encoder_hidden_states, hidden_states)
        x = one_stream(self, x, modulation, image_rotary_emb=image_rotary_emb, **told)
        return x[:, :tokens], x[:, tokens:]


def joined(captions: Tensor, pictures: Tensor) -> Tensor:
    """Both side by side; without a copy where they are the two parts of one tensor, as the block before left them."""
    whole = captions._base
    if whole is not None and whole is pictures._base and whole.dim() == 3 and not torch.compiler.is_compiling():
        parts = whole[:, : captions.shape[1]], whole[:, captions.shape[1] :]
        alike = zip((captions, pictures), parts)
        if all(one.storage_offset() == part.storage_offset() and one.shape == part.shape for one, part in alike):
            return whole
    return torch.cat([captions, pictures], 1)


class ChromaTransformerBlock(transformer_chroma.ChromaTransformerBlock):
    """Chroma's two streams."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None,
        attention_mask: Tensor | None = None, joint_attention_kwargs: Told = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(captions, pictures)."""
        if joint_attention_kwargs:
            more = (image_rotary_emb, attention_mask, joint_attention_kwargs)
            return super().forward(hidden_states, encoder_hidden_states, temb, *more)
        told = {"image_rotary_emb": image_rotary_emb, "attention_mask": of_pairs(attention_mask)}
        own = (part.unbind(1) for part in (temb[:, :6], temb[:, 6:]))
        return two_streams(self, hidden_states, encoder_hidden_states, *own, **told)


class ChromaSingleTransformerBlock(transformer_chroma.ChromaSingleTransformerBlock):
    """Chroma's one stream of both."""

    def forward(
        self, hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None, attention_mask: Tensor | None = None,
        joint_attention_kwargs: Told = None,
    ) -> Tensor:  # fmt: skip
        """The tokens."""
        told = {"image_rotary_emb": image_rotary_emb, "attention_mask": of_pairs(attention_mask)}
        return one_stream(self, hidden_states, temb.unbind(1), **told, **joint_attention_kwargs or {})


def of_pairs(mask_BT: Tensor | None) -> Tensor | None:
    """A mask of pairs of tokens [B, 1, T, T] from that of tokens."""
    return None if mask_BT is None else mask_BT[:, None, None, :] * mask_BT[:, None, :, None]


class Flux2TransformerBlock(transformer_flux2.Flux2TransformerBlock):
    """FLUX.2's two streams; all blocks have one modulation."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb_mod_img: Tensor, temb_mod_txt: Tensor,
        image_rotary_emb: Any = None, joint_attention_kwargs: Told = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(captions, pictures)."""
        told = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
        own = (modulation.chunk(6, -1) for modulation in (temb_mod_img, temb_mod_txt))
        return two_streams(self, hidden_states, encoder_hidden_states, *own, **told)


class Flux2SingleTransformerBlock(transformer_flux2.Flux2SingleTransformerBlock):
    """FLUX.2's one stream of both."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, temb_mod: Tensor,
        image_rotary_emb: Any = None, joint_attention_kwargs: Told = None, split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Any:  # fmt: skip
        """The tokens, or (captions, pictures)."""
        if encoder_hidden_states is not None or split_hidden_states:
            more = (image_rotary_emb, joint_attention_kwargs, split_hidden_states, text_seq_len)
            return super().forward(hidden_states, encoder_hidden_states, temb_mod, *more)
        stream, told = Stream(hidden_states, temb_mod.chunk(3, -1), self.norm), joint_attention_kwargs or {}
        return stream.end(self.attn(hidden_states=stream.normal, image_rotary_emb=image_rotary_emb, **told))


class QwenImageTransformerBlock(transformer_qwenimage.QwenImageTransformerBlock):
    """Qwen-Image's two streams."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_mask: Tensor, temb: Tensor,
        image_rotary_emb: Any = None, joint_attention_kwargs: Told = None, modulate_index: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(captions, pictures)."""
        told = {"encoder_hidden_states_mask": encoder_hidden_states_mask, "image_rotary_emb": image_rotary_emb}
        if self.zero_cond_t or modulate_index is not None:
            more = {**told, "joint_attention_kwargs": joint_attention_kwargs, "modulate_index": modulate_index}
            return super().forward(hidden_states, encoder_hidden_states, temb=temb, **more)
        pictures = Stream(hidden_states, self.img_mod(temb).chunk(6, -1), self.img_norm1)
        captions = Stream(encoder_hidden_states, self.txt_mod(temb).chunk(6, -1), self.txt_norm1)
        given = {"hidden_states": pictures.normal, "encoder_hidden_states": captions.normal}
        y, z = self.attn(**given, **told, **joint_attention_kwargs or {})
        return captions.feed(z, self.txt_norm2, self.txt_mlp), pictures.feed(y, self.img_norm2, self.img_mlp)


class JointTransformerBlock(attention.JointTransformerBlock):
    """SD3's two streams; the captions of the last block are read and not written."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, joint_attention_kwargs: Told = None
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """(captions, pictures)."""
        if self.use_dual_attention or self.context_pre_only or self._chunk_size is not None:
            return super().forward(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        own = (norm.linear(norm.silu(temb)).chunk(6, 1) for norm in (self.norm1, self.norm1_context))
        return two_streams(self, hidden_states, encoder_hidden_states, *own, **joint_attention_kwargs or {})


class Krea2TransformerBlock(transformer_krea2.Krea2TransformerBlock):
    """Krea 2's stream, whose modulation is one of all blocks and a table of each."""

    def forward(
        self, hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The tokens."""
        scale, shift, gate, *later = (temb.unflatten(-1, (6, -1)) + self.scale_shift_table).unbind(-2)
        stream = Stream(hidden_states, (shift, scale, gate, later[1], later[0], later[2]), self.norm1)
        y = self.attn(stream.normal, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)
        return stream.feed(y, self.norm2, self.ff)


class ZImageTransformerBlock(transformer_z_image.ZImageTransformerBlock):
    """Z-Image's stream."""

    def forward(
        self, x: Tensor, attn_mask: Tensor, freqs_cis: Tensor, adaln_input: Tensor | None = None,
        noise_mask: Tensor | None = None, adaln_noisy: Tensor | None = None, adaln_clean: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The tokens."""
        if noise_mask is not None:
            return super().forward(x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)
        modulation = self.adaLN_modulation(adaln_input).chunk(4, 1) if self.modulation else None
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        told = {"attention_mask": attn_mask, "freqs_cis": freqs_cis}
        return between_norms(x, modulation, norms, lambda x: self.attention(x, **told), self.feed_forward)


class Ideogram4TransformerBlock(transformer_ideogram4.Ideogram4TransformerBlock):
    """Ideogram 4's stream."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, image_rotary_emb: Any, adaln_input: Tensor
    ) -> Tensor:
        """The tokens."""
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        told = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
        own = self.adaln_modulation(adaln_input).chunk(4, -1)
        return between_norms(hidden_states, own, norms, lambda x: self.attention(x, **told), self.feed_forward)


class Lumina2TransformerBlock(transformer_lumina2.Lumina2TransformerBlock):
    """Lumina-Image's stream."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, image_rotary_emb: Tensor, temb: Tensor | None = None
    ) -> Tensor:
        """The tokens."""
        modulation = self.norm1.linear(self.norm1.silu(temb)).chunk(4, 1) if self.modulation else None
        norms = (self.norm1.norm if self.modulation else self.norm1, self.norm2, self.ffn_norm1, self.ffn_norm2)
        told = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}

        def attend(own: Tensor) -> Tensor:
            return self.attn(hidden_states=own, encoder_hidden_states=own, **told)

        return between_norms(hidden_states, modulation, norms, attend, self.feed_forward)


BLOCKS = {kind.__base__: kind for kind in (
    FluxTransformerBlock, FluxSingleTransformerBlock, ChromaTransformerBlock, ChromaSingleTransformerBlock,
    Flux2TransformerBlock, Flux2SingleTransformerBlock, QwenImageTransformerBlock, JointTransformerBlock,
    Krea2TransformerBlock, ZImageTransformerBlock, Ideogram4TransformerBlock, Lumina2TransformerBlock,
)}  # fmt: skip
"""The blocks here by those of diffusers whose places they take."""


def fuse_modulation(denoiser: nn.Module) -> int:
    """The number of blocks whose norms take modulation and additions along now."""
    fused = 0
    for module in denoiser.modules():
        if type(module) in BLOCKS:
            module.__class__ = BLOCKS[type(module)]
            fused += 1
    return fused
