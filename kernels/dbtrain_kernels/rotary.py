"""RMSNorm and rotary embedding of the queries and keys of transformers, in one pass forward and one backward."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case, seeded
from dbtrain_kernels.dispatch import choose, dtype_problem

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAUNCHES = {"rotary": lambda *_: 1, "rotary_backward": lambda *_: 1}
"""Kernels that each operator starts."""


def rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, halves: bool = False) -> Tensor:
    """What `reference.rotary` is; on a GPU in one launch, and one in backward. Computed in fp32, rounded once. x alone
    has a gradient; it may be a view whose last dimension is whole, such as a part of a projection of q, k and v."""
    if not choose("rotary", x.device.type, dtype_problem(FLOATS, x=x, weight=weight, cos=cos, sin=sin)).fused:
        return reference.rotary(x, weight, cos, sin, eps, halves)
    return rotary_op(by_head(x), weight, cos, sin, eps, halves)


def by_head(x: Tensor) -> Tensor:
    """x, in which the features of a head are neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("dbtrain::rotary", mutates_args=())
def rotary_op(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, halves: bool) -> Tensor:
    """The turned x, contiguous; the features of a head of x are neighbours."""
    from dbtrain_kernels.rotary_triton import forward

    return forward(x, weight, cos, sin, eps, halves)


@rotary_op.register_fake
def _(x, *others):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("dbtrain::rotary_backward", mutates_args=())
def rotary_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, halves: bool
) -> Tensor:
    """The gradient of x, contiguous; the features of a head are neighbours in both."""
    from dbtrain_kernels.rotary_triton import backward

    return backward(grad, x, weight, cos, sin, eps, halves)


@rotary_backward_op.register_fake
def _(grad, x, *others):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output):
    *tensors, ctx.eps, ctx.halves = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return rotary_backward_op(by_head(grad), *ctx.saved_tensors, ctx.eps, ctx.halves), *[None] * 5


rotary_op.register_autograd(_backward, setup_context=_keep)

LAYERS = {"FLUX.1, 1": (2, 4608, 24, 128), "Z-Image, 1": (2, 4160, 30, 128)}
"""Samples, tokens, heads and their width of an attention's queries."""


def inputs(
    shape: tuple[int, ...] = (2, 5, 3, 8), dtype: torch.dtype = torch.float32, halves: bool = False,
    each: bool = False, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments. each: each sample has angles of its own, which lie as the parts of complex numbers."""
    drawn: dict[str, Any] = {"generator": seeded(device, 8), "device": device}
    batch, tokens, _, width = shape
    angle = 6 * torch.rand((batch if each else 1, tokens, width // 2), **drawn)
    parts = torch.stack([angle.cos(), angle.sin()], -1 if each else 0)
    cos, sin = parts.unbind(-1 if each else 0)
    weight = (1 + 0.3 * torch.randn(width, **drawn)).to(dtype)
    x = torch.randn(shape, **drawn).to(dtype)
    return {"x": x, "weight": weight, "cos": cos, "sin": sin, "eps": 1e-6, "halves": halves}


def work() -> list[Case]:
    """bf16. Bytes: x is read and written, then it and the gradient are read and one is written."""
    call = partial(inputs, dtype=torch.bfloat16)
    return [Case(name, partial(call, shape), moved=math.prod(shape) * 2 * 5) for name, shape in LAYERS.items()]
