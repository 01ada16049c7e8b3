"""The stacked LoRA update: shrink and expand for N adapters, with a backward that casts nothing beforehand."""

import torch
from torch import Tensor

from dbtrain_kernels import reference
from dbtrain_kernels.dispatch import choose, dtype_problem

FLOATS = (torch.float32, torch.bfloat16)
MAX_RANK = 128
"""Largest rank whose tile of a program stays in registers."""
SPLIT = 1024
"""Tokens that one program of a sum over tokens takes: a constant, so that its order depends on its length only."""


def lora(x: Tensor, base: Tensor, down_NRD: Tensor, up_NDR: Tensor, scale_N: Tensor) -> Tensor:
    """What `reference.lora` is; on a GPU in two launches and four or six in backward, fp32 masters read as they are.

    Sums are fp32, in a fixed order; the gradients of fp32 matrices are never rounded.
    """
    problem = (
        dtype_problem(FLOATS, x=x, base=base)
        or dtype_problem(FLOATS, down_NRD=down_NRD, up_NDR=up_NDR)
        or (f"the rank is {down_NRD.shape[1]}, over {MAX_RANK}" if down_NRD.shape[1] > MAX_RANK else None)
    )
    if not choose("lora", x.device.type, problem).fused:
        return reference.lora(x, base, down_NRD, up_NDR, scale_N)
    return lora_op(x.to(base.dtype), base, down_NRD, up_NDR, scale_N)[0]


@torch.library.custom_op("dbtrain::lora", mutates_args=())
def lora_op(x: Tensor, base: Tensor, down_NRD: Tensor, up_NDR: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """(output of base's shape, scale_n A_n x as fp32 [N, T, R], which backward needs)."""
    from dbtrain_kernels.lora_triton import forward

    return forward(x.contiguous(), base.contiguous(), by_row(down_NRD), by_row(up_NDR), scale_N.float())


def by_row(matrices: Tensor) -> Tensor:
    """Matrices [N, ...] each of which is contiguous: views of an arena are, and are not copied."""
    return matrices if matrices[0].is_contiguous() else matrices.contiguous()


@lora_op.register_fake
def _(x, base, down_NRD, up_NDR, scale_N):
    subjects, rank, _ = down_NRD.shape
    small = x.new_empty((subjects, x.numel() // x.shape[-1] // subjects, rank), dtype=torch.float32)
    return torch.empty_like(base, memory_format=torch.contiguous_format), small


@torch.library.custom_op("dbtrain::lora_backward", mutates_args=())
def lora_backward_op(
    grad: Tensor, small_NTR: Tensor, x: Tensor, down_NRD: Tensor, up_NDR: Tensor, scale_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, down_NRD and up_NDR; base's is `grad` itself."""
    from dbtrain_kernels.lora_triton import backward

    matrices = by_row(down_NRD), by_row(up_NDR)
    return backward(grad.contiguous(), small_NTR.contiguous(), x.contiguous(), *matrices, scale_N.float())


@lora_backward_op.register_fake
def _(grad, small_NTR, x, down_NRD, up_NDR, scale_N):
    return tuple(torch.empty_like(like, memory_format=torch.contiguous_format) for like in (x, down_NRD, up_NDR))


def _keep(ctx, inputs, output):
    x, _, down_NRD, up_NDR, scale_N = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], x, down_NRD, up_NDR, scale_N)


def _backward(ctx, grad, _):
    if grad is None:
        return None, None, None, None, None
    by_x, by_down, by_up = lora_backward_op(grad, *ctx.saved_tensors)
    return by_x, grad, by_down, by_up, None


lora_op.register_autograd(_backward, setup_context=_keep)
