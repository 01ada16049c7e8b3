"""Triton kernels of gated features, GEGLU and SwiGLU: a block of one token's features a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Features of one program: 16 bytes of bf16 for each of AMD's 256 threads."""


@triton.jit
def gate_forward(GATE, VALUE, Y, of_gate, of_value, WIDTH, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """y = value * gelu(gate), or value * silu(gate). of_gate, of_value: from one token to the next."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    gate = tl.load(GATE + row * of_gate + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(VALUE + row * of_value + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate) if SILU else 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(Y + row * WIDTH + at, (value * gate * share).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward(
    GRAD, GATE, VALUE, INTO_GATE, INTO_VALUE, of_gate, of_value, into, WIDTH, SILU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradients of value and gate: dy gelu(gate), and dy value (Phi(gate) + gate phi(gate)); or those with silu. into:
    from one token to the next in both."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    grad = tl.load(GRAD + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * of_gate + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(VALUE + row * of_value + at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        share = tl.sigmoid(gate)
        slope = share + gate * share * (1.0 - share)
    else:
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(INTO_VALUE + row * into + at, (grad * gate * share).to(INTO_VALUE.dtype.element_ty), mask=inside)
    tl.store(INTO_GATE + row * into + at, (grad * value * slope).to(INTO_GATE.dtype.element_ty), mask=inside)


def forward(gate: Tensor, value: Tensor, silu: bool) -> Tensor:
    """The gated values [..., H], contiguous; tokens of gate and value lie evenly in memory."""
    width, y = value.shape[-1], torch.empty_like(value, memory_format=torch.contiguous_format)
    gate_forward[(y.numel() // width, triton.cdiv(width, BLOCK))](
        gate, value, y, gate.stride(-2), value.stride(-2), width, SILU=silu, BLOCK=BLOCK
    )
    return y


def backward(grad: Tensor, gate: Tensor, value: Tensor, into_gate: Tensor, into_value: Tensor, silu: bool) -> None:
    """Write both gradients, whose tokens lie as each other's; grad is contiguous."""
    width = value.shape[-1]
    gate_backward[(grad.numel() // width, triton.cdiv(width, BLOCK))](
        grad, gate, value, into_gate, into_value, gate.stride(-2), value.stride(-2), into_gate.stride(-2), width,
        SILU=silu, BLOCK=BLOCK,
    )  # fmt: skip
