"""The stacked LoRA update of N adapters, and its backward; neither casts the matrices beforehand."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case, seeded
from dbtrain_kernels.dispatch import choose, dtype_problem, interpreting

FLOATS = (torch.float32, torch.bfloat16)
MAX_RANK = 128
"""Largest rank whose tile stays in the registers of a program."""
SPLIT = 128 if interpreting() else 2048
"""Tokens that one program of a sum over tokens takes: a constant, so that the order depends on the length only. Two
samples of SDXL's inner layers are one part; their programs fill an H200 as they are. Triton's interpreter, which has
the same code for parts of any length, takes a second for some dozens of tokens."""
LAUNCHES = {
    "lora": lambda *_: 2,
    "lora_backward": lambda grad, small_NTR, *rest: 2 + rest[-1] + (small_NTR.shape[1] > SPLIT),
}
"""Kernels that each operator starts. The gradient of x takes one, and sums over more than SPLIT tokens one more."""


def lora(x: Tensor, base: Tensor, down_NRD: Tensor, up_NDR: Tensor, scale_N: Tensor) -> Tensor:
    """What `reference.lora` is; on a GPU in two launches and two to four in backward, fp32 masters read as they are.

    Sums are fp32, in a fixed order; the gradients of fp32 matrices are never rounded.
    """
    if not choose("lora", x.device.type, lora_problem(up_NDR, x=x, base=base, down_NRD=down_NRD)).fused:
        return reference.lora(x, base, down_NRD, up_NDR, scale_N)
    matrices = by_row(down_NRD), by_row(up_NDR)
    return lora_op(x.to(base.dtype).contiguous(), base.contiguous(), *matrices, scale_N.float())[0]


def lora_problem(up: Tensor, **tensors: Tensor) -> str | None:
    """Why the kernels cannot take B [N, O, rank] and the other tensors of a call, or None."""
    wide = f"the rank is {up.shape[2]}, over {MAX_RANK}" if up.shape[2] > MAX_RANK else None
    return dtype_problem(FLOATS, **tensors, up=up) or wide


@torch.library.custom_op("dbtrain::lora", mutates_args=())
def lora_op(x: Tensor, base: Tensor, down_NRD: Tensor, up_NDR: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """(output of base's shape, scale_n A_n x as fp32 [N, T, R], which backward needs).

    x and base are contiguous, and each row of the matrices is.
    """
    from dbtrain_kernels.lora_triton import forward

    out = torch.empty_like(base)
    return out, forward(x, base, out, down_NRD, up_NDR, scale_N, (base.shape[-1],))


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
    grad: Tensor, small_NTR: Tensor, x: Tensor, down_NRD: Tensor, up_NDR: Tensor, scale_N: Tensor, by_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, down_NRD and up_NDR; base's is `grad` itself. The layouts are those of `lora_op`.

    by_x: whether x has a gradient; captions that are encoded once have none, and an empty tensor stands for it.
    """
    from dbtrain_kernels.lora_triton import backward

    of_x, of_down, of_up = _gradients(x, down_NRD, up_NDR, by_x)
    into = of_x if by_x else None, of_down, of_up
    backward(grad, small_NTR, x, down_NRD, up_NDR, scale_N, (grad.shape[-1],), *into, False, SPLIT)
    return of_x, of_down, of_up


def _gradients(x: Tensor, down_NRD: Tensor, up_NDR: Tensor, by_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of x, or an empty tensor, and of both matrices."""
    matrices = [torch.empty_like(like, memory_format=torch.contiguous_format) for like in (down_NRD, up_NDR)]
    of_x = torch.empty_like(x, memory_format=torch.contiguous_format) if by_x else x.new_empty(0)
    return of_x, matrices[0], matrices[1]


@lora_backward_op.register_fake
def _(grad, small_NTR, x, down_NRD, up_NDR, scale_N, by_x):
    return _gradients(x, down_NRD, up_NDR, by_x)


def _keep(ctx, inputs, output):
    x, _, down_NRD, up_NDR, scale_N = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], x, down_NRD, up_NDR, scale_N)


def _backward(ctx, grad, _):
    if grad is None:
        return None, None, None, None, None
    wanted = ctx.needs_input_grad[0]
    of_x, of_down, of_up = lora_backward_op(grad.contiguous(), *ctx.saved_tensors, wanted)
    return of_x if wanted else None, grad, of_down, of_up, None


lora_op.register_autograd(_backward, setup_context=_keep)


def _flops(x: Any, base: Any, down: Any, up: Any, *_: Any, **__: Any) -> int:
    """Floating-point operations of both products; a multiplication and an addition are two."""
    return 2 * math.prod(x[:-1]) * down[1] * (down[2] + up[1])


def _backward_flops(grad: Any, small: Any, x: Any, down: Any, up: Any, scale: Any, by_x: bool, **_: Any) -> int:
    """The same of the gradients' products: two for each of the forward pass, but for the gradient of x if none is
    wanted."""
    return 2 * _flops(x, grad, down, up) - (0 if by_x else 2 * math.prod(x) * down[1])


FLOPS = {"lora": _flops, "lora_backward": _backward_flops}
"""Floating-point operations of each operator, by the shapes of its arguments."""

LAYERS = {
    "SD1.5 4096 tokens, 1": (1, 4096, 320),
    "SD1.5 4096 tokens, 8": (8, 4096, 320),
    "SDXL 1024 tokens, 1": (1, 1024, 1280),
}
"""Subjects, tokens of an image, and width of an attention's projection."""
RANK, SAMPLES = 16, 2


def inputs(
    subjects: int = 2, samples: int = 2, tokens: int = 7, wide: int = 9, out: int = 11, rank: int = 3,
    dtype: torch.dtype = torch.float32, matrices: torch.dtype = torch.float32, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments. samples: of each subject. matrices: the dtype of the adapters."""
    drawn: dict[str, Any] = {"generator": seeded(device, 4), "device": device}
    lead = (subjects * samples, tokens)
    return {
        "x": torch.randn((*lead, wide), **drawn).to(dtype),
        "base": torch.randn((*lead, out), **drawn).to(dtype),
        "down_NRD": (torch.randn((subjects, rank, wide), **drawn) * wide**-0.5).to(matrices),
        "up_NDR": torch.randn((subjects, out, rank), **drawn).to(matrices),
        "scale_N": torch.rand(subjects, **drawn) + 0.5,
    }


def work() -> list[Case]:
    """bf16 tokens and fp32 matrices. Bytes: x, base and output, then dy twice, x and dx; both matrices three times."""
    made = []
    for name, (subjects, tokens, width) in LAYERS.items():
        call = partial(inputs, subjects, SAMPLES, tokens, width, width, RANK, torch.bfloat16)
        moved = subjects * (SAMPLES * tokens * width * 2 * 7 + 2 * RANK * width * 4 * 3)
        made.append(Case(name, call, torch.bfloat16, moved))
    return made
