"""SwiGLU, the gate of transformers' feed-forward layers, in one pass forward and one backward."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case, seeded
from dbtrain_kernels.dispatch import choose, dtype_problem
from dbtrain_kernels.geglu import FLOATS

LAUNCHES = {"swiglu": lambda *_: 1, "swiglu_backward": lambda *_: 1}
"""Kernels that each operator starts."""


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """What `reference.swiglu` is; on a GPU in one launch, and one in backward. Computed in fp32, rounded once. Both may
    be parts of one projection, and are read where they lie."""
    problem = dtype_problem(FLOATS, gate=gate) or dtype_problem((gate.dtype,), value=value)
    if not choose("swiglu", gate.device.type, problem).fused:
        return reference.swiglu(gate, value)
    width = gate.shape[-1]
    return swiglu_op(*(_even(one.reshape(-1, width)) for one in (gate, value))).view(gate.shape)


def _even(x: Tensor) -> Tensor:
    """Tokens [T, H] whose features are neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("dbtrain::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, value: Tensor) -> Tensor:
    """The gated values, of tokens [T, H] whose features are neighbours."""
    from dbtrain_kernels.geglu_triton import forward

    return forward(gate, value, True)


@swiglu_op.register_fake
def _(gate, value):
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@torch.library.custom_op("dbtrain::swiglu_backward", mutates_args=())
def swiglu_backward_op(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and value, contiguous; grad is."""
    from dbtrain_kernels.geglu_triton import backward

    into = torch.empty_like(grad), torch.empty_like(grad)
    backward(grad, gate, value, *into, True)
    return into


@swiglu_backward_op.register_fake
def _(grad, gate, value):
    return torch.empty_like(grad), torch.empty_like(grad)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return swiglu_backward_op(grad.contiguous(), *ctx.saved_tensors)


swiglu_op.register_autograd(_backward, setup_context=_keep)

LAYERS = {"Z-Image, 1": (2, 4224, 10240)}
"""Samples, tokens and width of a feed-forward layer."""


def inputs(
    shape: tuple[int, ...] = (3, 5, 14), dtype: torch.dtype = torch.float32, parts: bool = False, device: str = "cpu"
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments. parts: of one projection."""
    x = 2 * torch.randn((2, *shape), generator=seeded(device, 10), device=device).to(dtype)
    gate, value = torch.cat([*x], -1).chunk(2, -1) if parts else x
    return {"gate": gate, "value": value}


def work() -> list[Case]:
    """bf16. Bytes: two are read and one written, then three read and two written."""
    calls = {name: partial(inputs, shape, torch.bfloat16) for name, shape in LAYERS.items()}
    return [Case(name, call, moved=math.prod(LAYERS[name]) * 2 * 8) for name, call in calls.items()]
