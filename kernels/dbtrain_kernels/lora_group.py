"""Linear layers that read one x as one operation: their frozen product and the stacked LoRA update of each.

The matrices' gradients are added where they belong, such as into a pack's arena; autograd makes no copies of them.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dbtrain_kernels.cases import Case, seeded
from dbtrain_kernels.dispatch import choose
from dbtrain_kernels.lora import SPLIT, by_row, lora_problem

LAUNCHES = {
    "lora_group": lambda *_: 2,
    "lora_group_backward": lambda grad, small_NTG, x, down, up, scale, of_x, *rest: (
        2 + (of_x is not None) + (small_NTG.shape[1] > SPLIT)
    ),
}
"""Kernels that each operator starts, however many layers there are."""


def lora_group(
    x: Tensor, weight: Tensor, bias: Tensor | None, down_NGD: Tensor, up_NOR: Tensor, scale_N: Tensor,
    widths: Sequence[int], into: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """What `reference.lora_group` is; on a GPU one product and two launches, two to four and one product in backward.

    into: tensors of the matrices' shapes, each row contiguous, to which their gradients are added; autograd then sees
    none for them. x has the dtype of the weight.
    """
    return _LoraGroup.apply(x, weight, bias, down_NGD, up_NOR, scale_N, tuple(widths), *(into or (None, None)))


class _LoraGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down_NGD, up_NOR, scale_N, widths, into_down, into_up):
        y = F.linear(x, weight, bias)
        ctx.fused = choose("lora_group", x.device.type, lora_problem(up_NOR, x=x, down_NGD=down_NGD)).fused
        if ctx.fused:
            x, down_NGD, up_NOR = x.contiguous(), by_row(down_NGD), by_row(up_NOR)
        forward = lora_group_op if ctx.fused else plain_forward
        small_NTG = forward(y, x, down_NGD, up_NOR, scale_N, list(widths))
        # What gradients are added to is not saved: other layers change the same arena before this layer's turn comes.
        ctx.widths, ctx.into = list(widths), (into_down, into_up)
        ctx.save_for_backward(small_NTG, x, weight, down_NGD, up_NOR, scale_N)
        return y

    @staticmethod
    def backward(ctx, grad):
        small_NTG, x, weight, down_NGD, up_NOR, scale_N = ctx.saved_tensors
        into_down, into_up = ctx.into
        grad = grad.contiguous()
        of_x = torch.matmul(grad, weight) if ctx.needs_input_grad[0] else None
        of_down = torch.zeros_like(down_NGD) if into_down is None else into_down
        of_up = torch.zeros_like(up_NOR) if into_up is None else into_up
        backward = lora_group_backward_op if ctx.fused else plain_backward
        backward(grad, small_NTG, x, down_NGD, up_NOR, scale_N, of_x, of_down, of_up, ctx.widths)
        given = into_down is not None
        return of_x, None, None, None if given else of_down, None if given else of_up, None, None, None, None


@torch.library.custom_op("dbtrain::lora_group", mutates_args=("y",))
def lora_group_op(
    y: Tensor, x: Tensor, down_NGD: Tensor, up_NOR: Tensor, scale_N: Tensor, widths: list[int]
) -> Tensor:
    """scale_n A_n x as fp32 [N, T, G]; adds each layer's update to its columns of y. Both are contiguous."""
    from dbtrain_kernels.lora_triton import forward

    return forward(x, y, y, down_NGD, up_NOR, scale_N.float(), widths)


@lora_group_op.register_fake
def _(y, x, down_NGD, up_NOR, scale_N, widths):
    subjects, deep, _ = down_NGD.shape
    return x.new_empty((subjects, x.numel() // x.shape[-1] // subjects, deep), dtype=torch.float32)


@torch.library.custom_op("dbtrain::lora_group_backward", mutates_args=("of_x", "of_down", "of_up"))
def lora_group_backward_op(
    grad: Tensor, small_NTG: Tensor, x: Tensor, down_NGD: Tensor, up_NOR: Tensor, scale_N: Tensor,
    of_x: Tensor | None, of_down: Tensor, of_up: Tensor, widths: list[int],
) -> None:  # fmt: skip
    """Adds the gradients of x, unless there is none, and of the matrices to what these tensors hold."""
    from dbtrain_kernels.lora_triton import backward

    backward(grad, small_NTG, x, down_NGD, up_NOR, scale_N.float(), widths, of_x, of_down, of_up, True, SPLIT)


def plain_forward(
    y: Tensor, x: Tensor, down_NGD: Tensor, up_NOR: Tensor, scale_N: Tensor, widths: list[int]
) -> Tensor:
    """What `lora_group_op` is, by PyTorch's own products, in the dtype of x."""
    subjects, dtype = len(scale_N), x.dtype
    small_NTG = x.reshape(subjects, -1, x.shape[-1]) @ down_NGD.mT.to(dtype) * scale_N.to(dtype)[:, None, None]
    ups = up_NOR.to(dtype).split(widths, 1)
    columns = y.view(subjects, -1, y.shape[-1]).split(widths, 2)
    for part, small, up in zip(columns, small_NTG.chunk(len(widths), 2), ups):
        part.baddbmm_(small, up.mT)
    return small_NTG


def plain_backward(
    grad: Tensor, small_NTG: Tensor, x: Tensor, down_NGD: Tensor, up_NOR: Tensor, scale_N: Tensor,
    of_x: Tensor | None, of_down: Tensor, of_up: Tensor, widths: list[int],
) -> None:  # fmt: skip
    """What `lora_group_backward_op` is, by PyTorch's own products, in the dtype of x."""
    subjects, dtype = len(scale_N), x.dtype
    grad_NTO, x_NTD = grad.view(subjects, -1, grad.shape[-1]), x.reshape(subjects, -1, x.shape[-1])
    layers = list(zip(grad_NTO.split(widths, 2), up_NOR.to(dtype).split(widths, 1)))
    grad_NTG = torch.cat([part @ up for part, up in layers], 2) * scale_N.to(dtype)[:, None, None]
    smalls = small_NTG.chunk(len(widths), 2)
    of_up += torch.cat([part.mT @ small for (part, _), small in zip(layers, smalls)], 1)
    of_down += grad_NTG.mT @ x_NTD
    if of_x is not None:
        of_x.view(x_NTD.shape).baddbmm_(grad_NTG, down_NGD.to(dtype))


def _flops(y: Any, x: Any, down: Any, up: Any, *_: Any, **__: Any) -> int:
    """Floating-point operations of the low-rank products; the frozen product is an operator of its own."""
    return 2 * math.prod(x[:-1]) * (down[1] * down[2] + up[1] * up[2])


def _backward_flops(
    grad: Any, small: Any, x: Any, down: Any, up: Any, scale: Any, of_x: Any, *_: Any, **__: Any
) -> int:  # fmt: skip
    """The same of the gradients' products."""
    return 2 * _flops(grad, x, down, up) - (2 * math.prod(x) * down[1] if of_x is None else 0)


FLOPS = {"lora_group": _flops, "lora_group_backward": _backward_flops}
"""Floating-point operations of each operator, by the shapes of its arguments."""


SELF_ATTENTION = {"SD1.5 q, k, v, 8": (8, 4096, 320), "SDXL q, k, v, 2": (2, 1024, 1280)}
"""Subjects, tokens of an image, and width."""


def inputs(
    subjects: int = 2, samples: int = 2, tokens: int = 7, wide: int = 9, widths: Sequence[int] = (11, 4, 11),
    rank: int = 3, dtype: torch.dtype = torch.float32, matrices: torch.dtype = torch.float32, bias: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments. samples: of each subject. widths: of the layers. matrices: the dtype of the adapters."""
    drawn: dict[str, Any] = {"generator": seeded(device, 5), "device": device}
    out, deep = sum(widths), rank * len(widths)
    return {
        "x": torch.randn((subjects * samples, tokens, wide), **drawn).to(dtype),
        "weight": (torch.randn((out, wide), **drawn) * wide**-0.5).to(dtype),
        "bias": torch.randn(out, **drawn).to(dtype) if bias else None,
        "down_NGD": (torch.randn((subjects, deep, wide), **drawn) * wide**-0.5).to(matrices),
        "up_NOR": torch.randn((subjects, out, rank), **drawn).to(matrices),
        "scale_N": torch.rand(subjects, **drawn) + 0.5,
        "widths": tuple(widths),
    }


def work() -> list[Case]:
    """q, k and v in bf16. Bytes: x, the output thrice, dy thrice, dx twice and x again; all matrices three times."""
    made = []
    for name, (subjects, tokens, width) in SELF_ATTENTION.items():
        call = partial(inputs, subjects, 2, tokens, width, 3 * (width,), 16, torch.bfloat16, torch.bfloat16)
        moved = subjects * (2 * tokens * width * 2 * (3 * 6 + 4) + 6 * 16 * width * 2 * 3)
        made.append(Case(name, call, torch.bfloat16, moved))
    return made
