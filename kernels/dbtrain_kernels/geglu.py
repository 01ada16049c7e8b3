"""GEGLU, the gate of the U-Nets' feed-forward layers, in one pass forward and one backward."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case, seeded
from dbtrain_kernels.dispatch import choose, dtype_problem

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAUNCHES = {"geglu": lambda *_: 1, "geglu_backward": lambda *_: 1}
"""Kernels that each operator starts."""


def geglu(x: Tensor) -> Tensor:
    """What `reference.geglu` is; on a GPU in one launch, and one in backward, which needs x alone. Computed in fp32,
    rounded once."""
    if not choose("geglu", x.device.type, dtype_problem(FLOATS, x=x)).fused:
        return reference.geglu(x)
    return geglu_op(x.contiguous())


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    """Values and gates [T, H] of contiguous x."""
    return x.view(-1, x.shape[-1]).chunk(2, -1)


@torch.library.custom_op("dbtrain::geglu", mutates_args=())
def geglu_op(x: Tensor) -> Tensor:
    """The gated half, of contiguous x."""
    from dbtrain_kernels.geglu_triton import forward

    value, gate = _halves(x)
    return forward(gate, value, False).view(*x.shape[:-1], -1)


@geglu_op.register_fake
def _(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("dbtrain::geglu_backward", mutates_args=())
def geglu_backward_op(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x; both are contiguous."""
    from dbtrain_kernels.geglu_triton import backward

    of_x = torch.empty_like(x)
    (value, gate), (of_value, of_gate) = _halves(x), _halves(of_x)
    backward(grad, gate, value, of_gate, of_value, False)
    return of_x


@geglu_backward_op.register_fake
def _(grad, x):
    return torch.empty_like(x)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return geglu_backward_op(grad.contiguous(), *ctx.saved_tensors)


geglu_op.register_autograd(_backward, setup_context=_keep)

LAYERS = {"SD1.5 4096 tokens, 8": (16, 4096, 1280), "SDXL 1024 tokens, 2": (4, 1024, 5120)}
"""Samples, tokens and width of a feed-forward layer."""


def inputs(
    shape: tuple[int, ...] = (3, 5, 14), dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments."""
    return {"x": (2 * torch.randn(shape, generator=seeded(device, 6), device=device)).to(dtype)}


def work() -> list[Case]:
    """bf16. Bytes: two halves are read and one written, then three read and two written."""
    made = []
    for name, (samples, tokens, width) in LAYERS.items():
        call = partial(inputs, (samples, tokens, 2 * width), torch.bfloat16)
        made.append(Case(name, call, moved=math.prod((samples, tokens, width)) * 2 * 8))
    return made
