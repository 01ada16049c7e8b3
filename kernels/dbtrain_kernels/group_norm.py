"""GroupNorm with SiLU of a U-Net's blocks, of pictures with channels first or last, without changing their layout."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case, seeded
from dbtrain_kernels.dispatch import choose, dtype_problem

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAUNCHES = {"group_norm": lambda *_: 3, "group_norm_backward": lambda *_: 3}
"""Kernels that each operator starts."""
AGAIN = {"group_norm": (0,), "group_norm_backward": (0, 1)}
"""The arguments that each operator reads twice: for sums, then for every number."""


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = True, shift_BC: Tensor | None = None
) -> Tensor:
    """What `reference.group_norm` is; on a GPU in three launches, and three in backward, which keeps x alone. Computed
    in fp32, rounded once. x alone has a gradient: the others are frozen."""
    if not choose("group_norm", x.device.type, dtype_problem(FLOATS, x=x)).fused:
        return reference.group_norm(x, groups, weight, bias, eps, silu, shift_BC)
    shift_BC = None if shift_BC is None else shift_BC.contiguous()
    return group_norm_op(x.contiguous(memory_format=layout(x)), weight, bias, shift_BC, groups, eps, silu)[0]


def layout(x: Tensor) -> torch.memory_format:
    """How a picture [B, C, H, W] lies, or will lie once it is dense."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@torch.library.custom_op("dbtrain::group_norm", mutates_args=())
def group_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, shift_BC: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, center_BC, scale_BC, rstd_BG) of dense x; the last three in fp32, which backward needs."""
    from dbtrain_kernels.group_norm_triton import forward

    return forward(x, weight, bias, shift_BC, groups, eps, silu)


@group_norm_op.register_fake
def _(x, weight, bias, shift_BC, groups, eps, silu):
    factors = [x.new_empty((len(x), wide), dtype=torch.float32) for wide in (x.shape[1], x.shape[1], groups)]
    return torch.empty_like(x), *factors


@torch.library.custom_op("dbtrain::group_norm_backward", mutates_args=())
def group_norm_backward_op(
    grad: Tensor, x: Tensor, center_BC: Tensor, scale_BC: Tensor, rstd_BG: Tensor, weight: Tensor, bias: Tensor,
    silu: bool,
) -> Tensor:  # fmt: skip
    """The gradient of x; `grad` lies in memory as x does."""
    from dbtrain_kernels.group_norm_triton import backward

    return backward(grad, x, center_BC, scale_BC, rstd_BG, weight, bias, silu)


@group_norm_backward_op.register_fake
def _(grad, x, *others):
    return torch.empty_like(x)


def _keep(ctx, inputs, output):
    x, weight, bias, _, _, _, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *output[1:], weight, bias)


def _backward(ctx, grad, *_):
    if grad is None:
        return None, *[None] * 6
    x, *others = ctx.saved_tensors
    grad = grad.contiguous(memory_format=layout(x))
    return group_norm_backward_op(grad, x, *others, ctx.silu), *[None] * 6


group_norm_op.register_autograd(_backward, setup_context=_keep)

LAYERS = {"SD1.5 64 x 64, 8": (16, 320, 64, 64), "SD1.5 16 x 16, 8": (16, 1280, 16, 16),
          "SDXL 128 x 128, 2": (4, 320, 128, 128)}  # fmt: skip
"""Pictures, channels and sides of a layer's input."""


def inputs(
    shape: tuple[int, ...] = (3, 12, 5, 7), dtype: torch.dtype = torch.float32, groups: int = 4, silu: bool = True,
    shifted: bool = False, last: bool = False, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments. last: channels come last."""
    drawn: dict[str, Any] = {"generator": seeded(device, 7), "device": device}
    x = 0.5 + torch.randn(shape, **drawn)
    arguments = {"x": x.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format),
                 "groups": groups, "eps": 1e-5, "silu": silu,
                 "weight": (1 + 0.3 * torch.randn(shape[1], **drawn)).to(dtype),
                 "bias": (0.3 * torch.randn(shape[1], **drawn)).to(dtype)}  # fmt: skip
    if shifted:
        arguments["shift_BC"] = torch.randn(shape[:2], **drawn).to(dtype)
    return arguments


def work() -> list[Case]:
    """bf16, channels last. Bytes: x twice and y, then x and the gradient twice and that of x."""
    call = partial(inputs, dtype=torch.bfloat16, groups=32, shifted=True, last=True)
    return [Case(name, partial(call, shape), moved=math.prod(shape) * 2 * 8) for name, shape in LAYERS.items()]
