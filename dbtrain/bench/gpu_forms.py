"""Operations as a GPU runs them, one operator each, where PyTorch takes them apart on the meta device; for counting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SEVERAL = {"native_group_norm": (3, (0,)), "native_group_norm_backward": (4, (0, 1))}
"""Kernels of PyTorch's operators that start several on CUDA, and the places of arguments that they read twice: sums,
factors of a group, of a channel (backward), then every number (ATen/native/cuda/group_norm_kernel.cu, with a frozen
weight)."""

Note = Callable[[int, int, int], None]
"""Told of kernels, the bytes that they move, and their operations."""


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor in memory: an expanded one is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def lies_last(tensor: Tensor) -> bool:
    """Whether a picture has its channels last."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def as_cudnn(name: str, args: Any, result: Any) -> tuple[Any, int, int]:
    """The result of an operator in the layout that cuDNN gives it, which the meta device does not know; and kernels and
    bytes of the copies that cuDNN makes inside a convolution.

    It computes with channels last. Where the input's or the weight's are so, its results are too, and it copies what
    it is given otherwise. Else it copies what it is given, and its result back.
    """
    if name == "convolution":
        (x, weight), given = args[:2], args[:1]
    elif name == "convolution_backward":
        (x, weight), given = args[1:3], args[:1]
    else:
        return result, 0, 0
    image = result if name == "convolution" else result[0]
    last = lies_last(x) or lies_last(weight)
    if last and image is not None:
        image = image.contiguous(memory_format=torch.channels_last)
        result = image if name == "convolution" else (image, *result[1:])
    copied = [one for one in (*given, *(() if last else (image,))) if one is not None and not lies_last(one)]
    return result, len(copied), sum(2 * bytes_of(one) for one in copied)


@contextmanager
def flash() -> Iterator[None]:
    """Attention as one operator. Autocast is left alone on the meta device, which has none; Ideogram 4 switches it off
    for its places."""
    kept, autocast = F.scaled_dot_product_attention, torch.autocast

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        groups = query.shape[1] // key.shape[1]  # heads that share keys and values
        if groups > 1:
            key, value = (shared.repeat_interleave(groups, 1) for shared in (key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    F.scaled_dot_product_attention = attention
    torch.autocast = lambda device_type, **rest: (  # type: ignore
        nullcontext() if device_type == "meta" else autocast(device_type, **rest)
    )
    try:
        yield
    finally:
        F.scaled_dot_product_attention, torch.autocast = kept, autocast  # type: ignore[misc]


@contextmanager
def one_kernel_norms(note: Note) -> Iterator[None]:
    """RMSNorm as one kernel (PyTorch's `_fused_rms_norm`, which there is for CUDA alone), where x has the weight's
    dtype; it copies an input that is a part of a wider one, as PyTorch's norms do."""
    kept = F.rms_norm

    def norm(x: Tensor, dim: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        mixed = weight is not None and weight.dtype != x.dtype
        return kept(x, dim, weight, eps) if mixed else _Norm.apply(x.contiguous(), note)

    F.rms_norm = norm  # type: ignore[assignment]
    try:
        yield
    finally:
        F.rms_norm = kept


class _Norm(torch.autograd.Function):
    """Shapes and costs of an RMSNorm with a frozen weight. Forward reads and writes x; backward reads x and the
    gradient, and writes one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Note) -> Tensor:
        ctx.save_for_backward(x)
        ctx.note = note
        note(1, 2 * bytes_of(x), 0)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        ctx.note(1, 3 * bytes_of(x), 0)
        return torch.empty_like(x), None
