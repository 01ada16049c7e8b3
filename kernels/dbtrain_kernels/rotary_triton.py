"""Triton kernels of RMSNorm with rotary embedding: some heads of one token a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8
"""Heads of a program: 8 of 128 features are 16 bytes of bf16 for each of 128 threads."""


@triton.jit
def pairs_of(BASE, at, head, heads, pair, width, HALVES: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Both members of each pair of features, [HEADS, PAIRS] in fp32: neighbours, or the halves of a head."""
    if HALVES:
        inside = (head[:, None] < heads) & (pair[None, :] < width // 2)
        first = tl.load(BASE + at[:, None] + pair[None, :], mask=inside, other=0.0)
        second = tl.load(BASE + at[:, None] + width // 2 + pair[None, :], mask=inside, other=0.0)
    else:
        feature = tl.arange(0, 2 * PAIRS)
        inside = (head[:, None] < heads) & (feature[None, :] < width)
        row = tl.load(BASE + at[:, None] + feature[None, :], mask=inside, other=0.0)
        first, second = tl.split(tl.reshape(row, (HEADS, PAIRS, 2)))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(
    OUT, at, first, second, head, heads, pair, width, HALVES: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """The reverse of `pairs_of`."""
    first, second = first.to(OUT.dtype.element_ty), second.to(OUT.dtype.element_ty)
    if HALVES:
        inside = (head[:, None] < heads) & (pair[None, :] < width // 2)
        tl.store(OUT + at[:, None] + pair[None, :], first, mask=inside)
        tl.store(OUT + at[:, None] + width // 2 + pair[None, :], second, mask=inside)
    else:
        feature = tl.arange(0, 2 * PAIRS)
        inside = (head[:, None] < heads) & (feature[None, :] < width)
        row = tl.reshape(tl.join(first, second), (HEADS, 2 * PAIRS))
        tl.store(OUT + at[:, None] + feature[None, :], row, mask=inside)


@triton.jit
def angles_of(COS, SIN, sample, token, pair, width, sample_stride, token_stride, pair_stride):
    """Cosine and sine of a token's pairs, [1, PAIRS] in fp32."""
    at, there = sample * sample_stride + token * token_stride + pair * pair_stride, pair < width // 2
    cos = tl.load(COS + at, mask=there, other=0.0).to(tl.float32)
    sin = tl.load(SIN + at, mask=there, other=0.0).to(tl.float32)
    return cos[None, :], sin[None, :]


@triton.jit
def weights_of(WEIGHT, pair, width, HALVES: tl.constexpr):
    """The norm's weights of both members of each pair, [1, PAIRS] in fp32."""
    there = pair < width // 2
    if HALVES:
        first, second = WEIGHT + pair, WEIGHT + width // 2 + pair
    else:
        first, second = WEIGHT + 2 * pair, WEIGHT + 2 * pair + 1
    a, b = tl.load(first, mask=there, other=0.0), tl.load(second, mask=there, other=0.0)
    return a.to(tl.float32)[None, :], b.to(tl.float32)[None, :]


@triton.jit
def turn_forward(
    X, WEIGHT, COS, SIN, Y, tokens, heads, width, x_sample, x_token, x_head, of_sample, of_token, of_pair, eps,
    HALVES: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A head's features over the root of their mean square, times the weights; then each pair turned by its angle."""
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    head, pair = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, PAIRS)
    at = sample * x_sample + token * x_token + head * x_head
    a, b = pairs_of(X, at, head, heads, pair, width, HALVES, HEADS, PAIRS)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(a * a + b * b, 1) / width + eps)
    of_a, of_b = weights_of(WEIGHT, pair, width, HALVES)
    a, b = a * rstd[:, None] * of_a, b * rstd[:, None] * of_b
    cos, sin = angles_of(COS, SIN, sample, token, pair, width, of_sample, of_token, of_pair)
    into = (row * heads + head) * width
    store_pairs(Y, into, a * cos - b * sin, b * cos + a * sin, head, heads, pair, width, HALVES, HEADS, PAIRS)


@triton.jit
def turn_backward(
    GRAD, X, WEIGHT, COS, SIN, OF_X, tokens, heads, width, grad_sample, grad_token, grad_head, x_sample, x_token,
    x_head, of_sample, of_token, of_pair, eps, HALVES: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The gradient turned back by the same angle, then through the norm: rstd (g - x rstd^2 mean(g x)), where g is the
    gradient of the normalized features."""
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    head, pair = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, PAIRS)
    at = sample * grad_sample + token * grad_token + head * grad_head
    p, q = pairs_of(GRAD, at, head, heads, pair, width, HALVES, HEADS, PAIRS)
    at = sample * x_sample + token * x_token + head * x_head
    a, b = pairs_of(X, at, head, heads, pair, width, HALVES, HEADS, PAIRS)
    cos, sin = angles_of(COS, SIN, sample, token, pair, width, of_sample, of_token, of_pair)
    of_a, of_b = weights_of(WEIGHT, pair, width, HALVES)
    p, q = (p * cos + q * sin) * of_a, (q * cos - p * sin) * of_b
    rstd = 1.0 / tl.sqrt_rn(tl.sum(a * a + b * b, 1) / width + eps)
    tilt = rstd * rstd * tl.sum(a * p + b * q, 1) / width
    p, q = rstd[:, None] * (p - a * tilt[:, None]), rstd[:, None] * (q - b * tilt[:, None])
    store_pairs(OF_X, (row * heads + head) * width, p, q, head, heads, pair, width, HALVES, HEADS, PAIRS)


def _tile(x: Tensor, halves: bool) -> dict[str, int | bool]:
    return {"HALVES": halves, "HEADS": HEADS, "PAIRS": triton.next_power_of_2(x.shape[-1] // 2)}


def _angles(cos: Tensor) -> tuple[int, int, int]:
    """Strides of a sample, 0 where all have the same angles, of a token and of a pair."""
    return cos.stride(0) if len(cos) > 1 else 0, cos.stride(1), cos.stride(2)


def forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, halves: bool) -> Tensor:
    """The turned x [B, T, H, D], contiguous."""
    batch, tokens, heads, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    turn_forward[(batch * tokens, triton.cdiv(heads, HEADS))](
        x, weight, cos, sin, y, tokens, heads, width, *x.stride()[:3], *_angles(cos), eps, **_tile(x, halves)
    )
    return y


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, halves: bool
) -> Tensor:
    """The gradient of x, contiguous."""
    batch, tokens, heads, width = x.shape
    of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    turn_backward[(batch * tokens, triton.cdiv(heads, HEADS))](
        grad, x, weight, cos, sin, of_x, tokens, heads, width, *grad.stride()[:3], *x.stride()[:3], *_angles(cos), eps,
        **_tile(x, halves),
    )  # fmt: skip
    return of_x
