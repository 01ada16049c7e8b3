"""Triton kernels of a residual addition with the norm after it: one token's features a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 512
"""Features of one warp: 16 bytes of bf16 for each of AMD's 64 threads, twice that for NVIDIA's 32."""


@triton.jit
def numbers_of(BASE, at, inside):
    """Numbers in fp32; 0 outside."""
    return tl.load(BASE + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def inverse_root(x, width, eps):
    """1 / sqrt(mean of x^2 + eps)."""
    return 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / width + eps)


@triton.jit
def residual_forward(
    X, Y, GATE, SCALE, SHIFT, TOTAL, NORMAL, tokens, width, of_gate, of_scale, of_shift, eps, y_eps,
    ADDED: tl.constexpr, NORMED: tl.constexpr, GATED: tl.constexpr, SHIFTED: tl.constexpr, CENTERED: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total = x + gate norm(y), rounded; then (total - mean) rstd scale + shift, of the rounded total."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    sample, at, inside = row // tokens, row * width + c, c < width
    x = numbers_of(X, at, inside)
    if ADDED:
        y = numbers_of(Y, at, inside)
        if NORMED:
            y = y * inverse_root(y, width, y_eps)
        if GATED:
            y = y * numbers_of(GATE, sample * of_gate + c, inside)
        total = (x + y).to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + at, total, mask=inside)
        x = total.to(tl.float32)
    if CENTERED:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    scale = numbers_of(SCALE, sample * of_scale + c, inside)
    if UNIT:
        scale += 1.0
    normal = x * inverse_root(x, width, eps) * scale
    if SHIFTED:
        normal += numbers_of(SHIFT, sample * of_shift + c, inside)
    tl.store(NORMAL + at, normal.to(NORMAL.dtype.element_ty), mask=inside)


@triton.jit
def residual_backward(
    OF_TOTAL, OF_NORMAL, TOTAL, Y, GATE, SCALE, OF_X, OF_Y, tokens, width, of_gate, of_scale, eps, y_eps,
    NORMED: tl.constexpr, GATED: tl.constexpr, CENTERED: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = of_total + rstd (g - mean(g) - z mean(g z)), where g = scale of_normal and z is the normalized total; dy =
    gate dx, then through the norm of y in the same way."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    sample, at, inside = row // tokens, row * width + c, c < width
    z = numbers_of(TOTAL, at, inside)
    if CENTERED:
        z = tl.where(inside, z - tl.sum(z, 0) / width, 0.0)
    rstd = inverse_root(z, width, eps)
    z = z * rstd
    scale = numbers_of(SCALE, sample * of_scale + c, inside)
    if UNIT:
        scale += 1.0
    grad = numbers_of(OF_NORMAL, at, inside) * scale
    dx = grad - z * (tl.sum(grad * z, 0) / width)
    if CENTERED:
        dx = dx - tl.sum(grad, 0) / width
    dx = numbers_of(OF_TOTAL, at, inside) + rstd * dx
    tl.store(OF_X + at, dx.to(OF_X.dtype.element_ty), mask=inside)
    if GATED:
        dx = dx * numbers_of(GATE, sample * of_gate + c, inside)
    if NORMED:
        y = numbers_of(Y, at, inside)
        root = inverse_root(y, width, y_eps)
        y = y * root
        dx = root * (dx - y * (tl.sum(dx * y, 0) / width))
    if GATED or NORMED:
        tl.store(OF_Y + at, dx.to(OF_Y.dtype.element_ty), mask=inside)


def _sizes(x: Tensor) -> tuple[tuple[int], int, int, dict[str, int]]:
    """The grid, tokens of a sample and features of x [B, ..., D], and how a program is made."""
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    block = triton.next_power_of_2(width)
    return (rows,), rows // len(x), width, {"BLOCK": block, "num_warps": min(max(block // LANES, 1), 16)}


def _stride(factors: Tensor | None) -> int:
    """From one sample's factors [1 or B, D] to the next one's; 0 where all have the same."""
    return 0 if factors is None or len(factors) == 1 else factors.stride(0)


def forward(
    total: Tensor | None, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor | None,
    eps: float, y_eps: float | None, centered: bool, unit: bool,
) -> Tensor:  # fmt: skip
    """The norm of the total, which is written where y is given, of contiguous x and y [B, T, D]."""
    grid, tokens, width, tile = _sizes(x)
    normal = torch.empty_like(x)
    residual_forward[grid](
        x, y, gate, scale, shift, total, normal, tokens, width, _stride(gate), _stride(scale), _stride(shift), eps,
        y_eps or 0.0, ADDED=y is not None, NORMED=y_eps is not None, GATED=gate is not None, SHIFTED=shift is not None,
        CENTERED=centered, UNIT=unit, **tile,
    )  # fmt: skip
    return normal


def backward(
    of_total: Tensor, of_normal: Tensor, total: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor,
    eps: float, y_eps: float | None, centered: bool, unit: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradients of x and of y, None where they are the same, of contiguous arguments."""
    grid, tokens, width, tile = _sizes(total)
    of_x, of_y = torch.empty_like(total), None if gate is None and y is None else torch.empty_like(total)
    residual_backward[grid](
        of_total, of_normal, total, y, gate, scale, of_x, of_y, tokens, width, _stride(gate), _stride(scale), eps,
        y_eps or 0.0, NORMED=y is not None, GATED=gate is not None, CENTERED=centered, UNIT=unit, **tile,
    )  # fmt: skip
    return of_x, of_y
