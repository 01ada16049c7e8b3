"""The norm and the rotary embedding of a transformer's queries and keys as one kernel each way.

Every family of diffusers has the embedding in a function of its own, inside its attention processors. So a processor
here is its family's own, and is told of no places; instead the layer that it sees turns what it normalizes. That holds
for one model: no function of the library is replaced, and names and parameters stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4AttnProcessor
from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor, Krea2RMSNorm
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from torch import Tensor, nn

from dbtrain_kernels.rotary import rotary


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


class Angles(NamedTuple):
    """Cosine and sine [B or 1, T, D / 2] of each pair of features at each token."""

    cos: Tensor
    sin: Tensor

    def of_tokens(self, tokens: slice) -> Angles:
        """Those of some of the tokens."""
        return Angles(self.cos[:, tokens], self.sin[:, tokens])


def of_pairs(tables: tuple[Tensor, Tensor]) -> tuple[Angles, Angles]:
    """From tables [T, D] in which both members of a pair have the same number; captions are the first tokens."""
    both = Angles(*(table[None, :, ::2] for table in tables))
    return both, both


def of_numbers(numbers: Tensor) -> tuple[Angles, Angles]:
    """From complex numbers [T, D / 2] or [B, T, D / 2]."""
    parts = torch.view_as_real(numbers if numbers.dim() == 3 else numbers[None])
    both = Angles(parts[..., 0], parts[..., 1])
    return both, both


def of_streams(numbers: tuple[Tensor, Tensor]) -> tuple[Angles, Angles]:
    """From complex numbers of the picture's tokens and of the captions'."""
    (pictures, _), (captions, _) = map(of_numbers, numbers)
    return pictures, captions


FORMS: dict[type, tuple[str, Callable[[Any], tuple[Angles, Angles]]]] = {
    FluxAttnProcessor: ("image_rotary_emb", of_pairs),
    Flux2AttnProcessor: ("image_rotary_emb", of_pairs),
    Flux2ParallelSelfAttnProcessor: ("image_rotary_emb", of_pairs),
    Krea2AttnProcessor: ("image_rotary_emb", of_pairs),
    QwenDoubleStreamAttnProcessor2_0: ("image_rotary_emb", of_streams),
    Lumina2AttnProcessor2_0: ("image_rotary_emb", of_numbers),
    ZSingleStreamAttnProcessor: ("freqs_cis", of_numbers),
}
"""Processors by the argument that tells them the places, and how it is read: for pictures, and for captions that are
projected apart. In all of them the embedding follows the norm of queries and keys. (diffusers 0.42)"""
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def fusible(norm: Any) -> bool:
    """Whether a norm is one that `turned` computes: an RMSNorm with a frozen weight."""
    known = isinstance(norm, Norm | torch.nn.RMSNorm | RMSNorm | Krea2RMSNorm)
    return known and norm.weight is not None and not norm.weight.requires_grad


def turned(norm: Any, x: Tensor, angles: Angles, halves: bool = False) -> Tensor:
    """What a norm makes of x [B, T, H, D], with the rotary embedding."""
    weight = norm.weight + 1.0 if isinstance(norm, Krea2RMSNorm) else norm.weight
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return rotary(x, weight, *angles, eps, halves)


class Turning:
    """An attention layer, as its processor sees it, whose norms turn queries and keys as well."""

    def __init__(self, layer: nn.Module, pictures: Angles, captions: Angles):
        self.layer, self.pictures, self.captions = layer, pictures, captions

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def norm_q(self, x: Tensor) -> Tensor:
        """Queries of the picture, or of everything: the last tokens."""
        return turned(self.layer.norm_q, x, self.pictures.of_tokens(slice(-x.shape[1], None)))

    def norm_k(self, x: Tensor) -> Tensor:
        """Keys of the same."""
        return turned(self.layer.norm_k, x, self.pictures.of_tokens(slice(-x.shape[1], None)))

    def norm_added_q(self, x: Tensor) -> Tensor:
        """Queries of the captions: the first tokens."""
        return turned(self.layer.norm_added_q, x, self.captions.of_tokens(slice(x.shape[1])))

    def norm_added_k(self, x: Tensor) -> Tensor:
        """Keys of the same."""
        return turned(self.layer.norm_added_k, x, self.captions.of_tokens(slice(x.shape[1])))


@cache
def turning(kind: Any) -> Any:
    """A class of processors that computes as `kind` does, with norm and embedding as one."""
    name, read = FORMS[kind]
    place = [*inspect.signature(kind.__call__).parameters].index(name) - 2  # without self and the layer

    class OneKernel(kind):
        @wraps(kind.__call__)  # diffusers hands a processor the arguments that its signature names
        def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            places = args[place] if len(args) > place else kwargs.get(name)
            norms = [norm for norm in (getattr(layer, own, None) for own in NORMS) if norm is not None]
            if places is None or not all(map(fusible, norms)):
                return super().__call__(layer, *args, **kwargs)
            if len(args) > place:
                args = (*args[:place], None, *args[place + 1 :])
            else:
                kwargs[name] = None
            return super().__call__(Turning(layer, *read(places)), *args, **kwargs)

    return OneKernel


class Ideogram4(Ideogram4AttnProcessor):
    """Ideogram 4's: its pairs are the halves of a head, and it cannot do without places."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, attention_mask: Tensor, image_rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The layer's output."""
        if not (fusible(attn.norm_q) and fusible(attn.norm_k)):
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
        angles = Angles(*(table[..., : attn.head_dim // 2] for table in image_rotary_emb))
        q, k, v = (to(hidden_states).unflatten(-1, (-1, attn.head_dim)) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = turned(attn.norm_q, q, angles, halves=True), turned(attn.norm_k, k, angles, halves=True)
        return attn.to_out[0](dispatch_attention_fn(q, k, v, attn_mask=attention_mask).flatten(2, 3))


def fuse_rotary(denoiser: nn.Module) -> int:
    """The number of attention layers whose norms turn queries and keys now."""
    fused = 0
    for layer in denoiser.modules():
        kind: Any = type(getattr(layer, "processor", None))
        if kind is Ideogram4AttnProcessor:
            layer.processor = Ideogram4()
        elif kind in FORMS:
            layer.processor = turning(kind)()
        else:
            continue
        fused += 1
    return fused
