"""The addition of a layer's output to its residual and the norm after it, in one pass forward and one backward."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case, seeded
from dbtrain_kernels.dispatch import choose, dtype_problem

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAUNCHES = {"residual_norm": lambda *_: 1, "residual_norm_backward": lambda *_: 1}
"""Kernels that each operator starts."""


def residual_norm(
    x: Tensor, scale: Tensor, shift: Tensor | None = None, y: Tensor | None = None, gate: Tensor | None = None,
    eps: float = 1e-6, y_eps: float | None = None, centered: bool = True, unit: bool = False,
) -> reference.Normed:  # fmt: skip
    """What `reference.residual_norm` is; on a GPU in one launch, and one in backward, which adds the gradients of the
    total and of its norm. Computed in fp32, the total rounded once and read as it was rounded.

    x and y alone have gradients: where the others need one, or are of another dtype or of tokens, it is plain PyTorch.
    """
    own = [one for one in (scale, shift, gate) if one is not None]
    alike = all(one.dtype == x.dtype for one in (*own, x if y is None else y))
    alike &= all(of_samples(one, x) and not one.requires_grad for one in own)
    if not alike or not choose("residual_norm", x.device.type, dtype_problem(FLOATS, x=x)).fused:
        return reference.residual_norm(x, scale, shift, y, gate, eps, y_eps, centered, unit)
    factors = (None if one is None else by_sample(one) for one in (gate, scale, shift))
    y = None if y is None else y.contiguous()
    return reference.Normed(*_ResidualNorm.apply(x.contiguous(), y, *factors, eps, y_eps, centered, unit))


def of_samples(factors: Tensor, x: Tensor) -> bool:
    """Whether factors are those of all tokens of x, or of each sample, and not of tokens."""
    samples = factors.numel() // x.shape[-1]
    return samples == 1 or samples == len(x) == len(factors)


def by_sample(factors: Tensor) -> Tensor:
    """Factors of features [D], [B, D] or [B, 1, D] as [1 or B, D], neighbours in memory."""
    factors = factors.reshape(-1, factors.shape[-1])
    return factors if factors.stride(-1) == 1 else factors.contiguous()


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gate, scale, shift, *options):
        total = None if y is None else torch.empty_like(x)
        normal = residual_norm_op(total, x, y, gate, scale, shift, *options)
        ctx.options, ctx.apart = options, gate is not None or options[1] is not None
        ctx.save_for_backward(x if y is None else total, y if options[1] is not None else None, gate, scale)
        return x.view_as(x) if y is None else total, normal

    @staticmethod
    def backward(ctx, of_total, of_normal):
        given = (of_total.contiguous(), of_normal.contiguous(), *ctx.saved_tensors, *ctx.options)
        of_x, of_y = residual_norm_backward_op(*given)
        return of_x, (of_y if ctx.apart else of_x) if ctx.needs_input_grad[1] else None, *[None] * 7


@torch.library.custom_op("dbtrain::residual_norm", mutates_args=("total",))
def residual_norm_op(
    total: Tensor | None, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor | None,
    eps: float, y_eps: float | None, centered: bool, unit: bool,
) -> Tensor:  # fmt: skip
    """The norm of the total, which is written where there is a y. x, y: contiguous; factors: [1 or B, D]."""
    from dbtrain_kernels.residual_norm_triton import forward

    return forward(total, x, y, gate, scale, shift, eps, y_eps, centered, unit)


@residual_norm_op.register_fake
def _(total, x, *others):
    return torch.empty_like(x)


@torch.library.custom_op("dbtrain::residual_norm_backward", mutates_args=())
def residual_norm_backward_op(
    of_total: Tensor, of_normal: Tensor, total: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor,
    eps: float, y_eps: float | None, centered: bool, unit: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and y; empty for y where they are the same. y: only where it is normed."""
    from dbtrain_kernels.residual_norm_triton import backward

    of_x, of_y = backward(of_total, of_normal, total, y, gate, scale, eps, y_eps, centered, unit)
    return of_x, of_x.new_empty(0) if of_y is None else of_y


@residual_norm_backward_op.register_fake
def _(of_total, of_normal, total, y, gate, *others):
    return torch.empty_like(total), total.new_empty(0) if gate is None and y is None else torch.empty_like(total)


LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "SD1.5 4096 tokens, 8": ((16, 4096, 320), {}), "SDXL 1024 tokens, 2": ((4, 1024, 1280), {}),
    "FLUX.1, 1": ((2, 4096, 3072), {"modulated": True}),
    "Z-Image, 1": ((2, 4160, 3840), {"modulated": True, "centered": False, "normed": True}),
}  # fmt: skip
"""Samples, tokens and width of a block's layer, and what `inputs` is told."""


def inputs(
    shape: tuple[int, ...] = (3, 5, 14), dtype: torch.dtype = torch.float32, added: bool = True, centered: bool = True,
    modulated: bool = False, normed: bool = False, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments. added: a layer's output is. modulated: each sample has a scale, a shift (a norm that is
    centered) and a gate of its own, parts of one projection. normed: the layer's output has a norm of its own."""
    drawn: dict[str, Any] = {"generator": seeded(device, 9), "device": device}
    batch, width = shape[0], shape[-1]
    x, y = ((0.5 + torch.randn(shape, **drawn)).to(dtype) for _ in "xy")
    if modulated:
        scale, shift, gate = (0.5 * torch.randn((batch, 3 * width), **drawn)).to(dtype)[:, None].chunk(3, -1)
    else:
        scale, shift = ((0.3 * torch.randn(width, **drawn) + one).to(dtype) for one in (1, 0))
        gate = None
    return {"x": x, "y": y if added else None, "scale": scale, "shift": shift if centered else None,
            "gate": gate if added else None, "eps": 1e-5, "y_eps": 1e-5 if normed else None, "centered": centered,
            "unit": modulated}  # fmt: skip


def work() -> list[Case]:
    """bf16. Bytes: x, y, the total and its norm; then the total, both gradients and that of x, which is that of y
    unless y has a gate; and y again where it has a norm."""
    made = []
    for name, (shape, options) in LAYERS.items():
        passes = 8 + ("modulated" in options) + ("normed" in options)
        made.append(Case(name, partial(inputs, shape, torch.bfloat16, **options), moved=math.prod(shape) * 2 * passes))
    return made
