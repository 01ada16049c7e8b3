"""Triton kernels of GEGLU: a block of one token's features a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Features of one program: 16 bytes of bf16 for each of AMD's 256 threads."""


@triton.jit
def gate_forward(X, Y, WIDTH, BLOCK: tl.constexpr):
    """y = value * gelu(gate), of x = value, gate."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, start = at < WIDTH, X + row * 2 * WIDTH
    value = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(start + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(Y + row * WIDTH + at, (value * gate * share).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward(GRAD, X, OF_X, WIDTH, BLOCK: tl.constexpr):
    """Gradients of value and gate: dy gelu(gate), and dy value (Phi(gate) + gate phi(gate))."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, start, into = at < WIDTH, X + row * 2 * WIDTH, OF_X + row * 2 * WIDTH
    grad = tl.load(GRAD + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(start + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(into + at, (grad * gate * share).to(OF_X.dtype.element_ty), mask=inside)
    tl.store(into + WIDTH + at, (grad * value * slope).to(OF_X.dtype.element_ty), mask=inside)


def forward(x: Tensor) -> Tensor:
    """The gated half [..., H] of contiguous x [..., 2H]."""
    width = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], width))
    gate_forward[(y.numel() // width, triton.cdiv(width, BLOCK))](x, y, width, BLOCK=BLOCK)
    return y


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of contiguous x [..., 2H]."""
    width, of_x = x.shape[-1] // 2, torch.empty_like(x)
    gate_backward[(x.numel() // (2 * width), triton.cdiv(width, BLOCK))](grad, x, of_x, width, BLOCK=BLOCK)
    return of_x
