"""Triton kernels of the stacked LoRA update: shrink, expand, and sums over tokens. No host sync, no atomics.

Rows of x and y are tokens of one adapter's segment; a program works on one adapter (`me`). fp32 masters are rounded to
the dtype of the tokens in registers, so that no cast is launched and the tensor cores are used.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbtrain_kernels.dispatch import interpreting

TILES = {torch.bfloat16: 64, torch.float32: 32}
"""Side of a tile (tokens, columns of an output, columns summed at a time) by the dtype of the tokens. fp32 tiles of 64
do not fit the registers."""
DEEPEST = {torch.bfloat16: 128, torch.float32: 64}
"""Most of a rank that one product of `expand` sums: fp32 tiles of 32 x 128 do not fit the registers either."""
BLOCK = 1024
"""Elements of a matrix whose parts one program adds."""


@triton.jit
def shrink(
    wide, matrix, scale, small, tokens, width, rank, matrix_stride, matrix_width_stride, matrix_rank_stride,
    PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """small[n, t, r] = scale_n * sum_w wide[n, t, w] matrix[n, w, r], fp32."""
    me = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    r = tl.arange(0, RANK)
    rows = wide + me * tokens * width + t[:, None].to(tl.int64) * width
    columns = matrix + me * matrix_stride + r[None, :] * matrix_rank_stride
    sums = tl.zeros([TILE, RANK], tl.float32)
    for start in range(0, width, TILE):
        w = start + tl.arange(0, TILE)
        x = tl.load(rows + w[None, :], mask=(t[:, None] < tokens) & (w[None, :] < width), other=0.0)
        inside = (w[:, None] < width) & (r[None, :] < rank)
        m = tl.load(columns + w[:, None] * matrix_width_stride, mask=inside, other=0.0)
        sums = tl.dot(x.to(PRODUCTS), m.to(x.dtype).to(PRODUCTS), sums, input_precision=PRECISION)
    sums = sums * tl.load(scale + me)
    at = small + me * tokens * rank + t[:, None].to(tl.int64) * rank + r[None, :]
    tl.store(at, sums, mask=(t[:, None] < tokens) & (r[None, :] < rank))


@triton.jit
def expand(
    small, matrix, base, out, tokens, width, rank, matrix_stride, matrix_width_stride, matrix_rank_stride,
    PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, DEEP: tl.constexpr, TILE: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """out[n, t, w] = base[n, t, w] + sum_r small[n, t, r] matrix[n, w, r]."""
    me = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    w = tl.program_id(1) * TILE + tl.arange(0, TILE)
    dtype = out.dtype.element_ty
    y = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, RANK, DEEP):
        r = start + tl.arange(0, DEEP)
        at = small + me * tokens * rank + t[:, None].to(tl.int64) * rank + r[None, :]
        s = tl.load(at, mask=(t[:, None] < tokens) & (r[None, :] < rank), other=0.0)
        at = matrix + me * matrix_stride + r[:, None] * matrix_rank_stride + w[None, :] * matrix_width_stride
        m = tl.load(at, mask=(r[:, None] < rank) & (w[None, :] < width), other=0.0)
        y = tl.dot(s.to(dtype).to(PRODUCTS), m.to(dtype).to(PRODUCTS), y, input_precision=PRECISION)
    at = me * tokens * width + t[:, None].to(tl.int64) * width + w[None, :]
    inside = (t[:, None] < tokens) & (w[None, :] < width)
    if ADD:
        y += tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(dtype), mask=inside)


@triton.jit
def outer(
    small, wide, out, tokens, width, rank, out_width_stride, out_rank_stride,
    PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out[split, n, w, r] = sum over a split's tokens of wide[n, t, w] small[n, t, r]."""
    me, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    w = tl.program_id(0) * TILE + tl.arange(0, TILE)
    r = tl.arange(0, RANK)
    sums = tl.zeros([TILE, RANK], tl.float32)
    for start in range(0, tl.minimum(SPLIT, tokens - part * SPLIT), TILE):
        t = part * SPLIT + start + tl.arange(0, TILE)
        at = wide + me * tokens * width + t[None, :].to(tl.int64) * width + w[:, None]
        x = tl.load(at, mask=(t[None, :] < tokens) & (w[:, None] < width), other=0.0)
        at = small + me * tokens * rank + t[:, None].to(tl.int64) * rank + r[None, :]
        s = tl.load(at, mask=(t[:, None] < tokens) & (r[None, :] < rank), other=0.0)
        sums = tl.dot(x.to(PRODUCTS), s.to(x.dtype).to(PRODUCTS), sums, input_precision=PRECISION)
    at = out + (part * tl.num_programs(2) + me) * width * rank
    at += w[:, None].to(tl.int64) * out_width_stride + r[None, :] * out_rank_stride
    tl.store(at, sums.to(out.dtype.element_ty), mask=(w[:, None] < width) & (r[None, :] < rank))


@triton.jit
def add_parts(parts, out, count, elements, BLOCK: tl.constexpr):
    """out = the sum of `count` parts, one after another in fp32, in out's dtype."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for part in range(count):
        sums += tl.load(parts + tl.cast(part, tl.int64) * elements + place, mask=place < elements, other=0.0)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=place < elements)


def forward(x: Tensor, base: Tensor, down_NRD: Tensor, up_NDR: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """(base + scale_n B_n A_n x, scale_n A_n x as fp32 [N, T, R]); layouts as `lora_op` wants them."""
    _, rank, width = down_NRD.shape
    small_NTR = shrunk(x, down_NRD, scale_N, (width, rank), (1, width))
    return expanded(small_NTR, up_NDR, base, base, (rank, 1)), small_NTR


def backward(
    grad: Tensor, small_NTR: Tensor, x: Tensor, down_NRD: Tensor, up_NDR: Tensor, scale_N: Tensor, by_x: bool,
    split: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (empty unless `by_x` asks for it), down_NRD and up_NDR for that of the output, and what `forward`
    kept."""
    _, rank, width = down_NRD.shape
    grad_NTR = shrunk(grad, up_NDR, scale_N, (up_NDR.shape[1], rank), (rank, 1))
    of_x = expanded(grad_NTR, down_NRD, None, x, (1, width)) if by_x else x.new_empty(0)
    by_down = outer_sum(grad_NTR, x, down_NRD, (1, width), split)
    return of_x, by_down, outer_sum(small_NTR, grad, up_NDR, (rank, 1), split)


def shrunk(wide: Tensor, matrix: Tensor, scale_N: Tensor, sides: tuple[int, int], strides: tuple[int, int]) -> Tensor:
    """scale * wide @ matrix, [N, T, R]; sides and strides are (width, rank) of the matrix."""
    subjects, (width, rank) = len(scale_N), sides
    tokens, tile = wide.numel() // width // subjects, TILES[wide.dtype]
    small_NTR = wide.new_empty((subjects, tokens, rank), dtype=torch.float32)
    shrink[(triton.cdiv(tokens, tile), subjects)](
        wide, matrix, scale_N, small_NTR, tokens, width, rank, matrix.stride(0), *strides,
        RANK=_padded(rank), TILE=tile, **_products(wide.dtype),
    )  # fmt: skip
    return small_NTR


def expanded(small_NTR: Tensor, matrix: Tensor, base: Tensor | None, like: Tensor, strides: tuple[int, int]) -> Tensor:
    """base + small @ matrix^T, of `like`'s shape and dtype; strides are (width, rank) of the matrix."""
    subjects, tokens, rank = small_NTR.shape
    out, width, tile = torch.empty_like(like), like.shape[-1], TILES[like.dtype]
    expand[(triton.cdiv(tokens, tile), triton.cdiv(width, tile), subjects)](
        small_NTR, matrix, out if base is None else base, out, tokens, width, rank, matrix.stride(0), *strides,
        RANK=_padded(rank), DEEP=min(_padded(rank), DEEPEST[like.dtype]), TILE=tile, ADD=base is not None,
        **_products(like.dtype),
    )  # fmt: skip
    return out


def outer_sum(small_NTR: Tensor, wide: Tensor, like: Tensor, strides: tuple[int, int], split: int) -> Tensor:
    """wide^T @ small, in the layout and dtype of `like`: parts of `split` tokens, then the sum of the parts."""
    subjects, tokens, rank = small_NTR.shape
    width, parts, tile = wide.shape[-1], triton.cdiv(tokens, split), TILES[wide.dtype]
    out = like.new_empty((parts, *like.shape), dtype=like.dtype if parts == 1 else torch.float32)
    outer[(triton.cdiv(width, tile), parts, subjects)](
        small_NTR, wide, out, tokens, width, rank, *strides,
        RANK=_padded(rank), TILE=tile, SPLIT=split, **_products(wide.dtype),
    )  # fmt: skip
    if parts == 1:
        return out[0]
    whole, elements = like.new_empty(like.shape), like.numel()
    add_parts[(triton.cdiv(elements, BLOCK),)](out, whole, parts, elements, BLOCK=BLOCK)
    return whole


@cache
def _products(dtype: torch.dtype) -> dict[str, Any]:
    """How `tl.dot` multiplies operands of a dtype: bf16 as they are; fp32 as three products of TF32 parts where there
    are TF32 tensor cores (NVIDIA), whose results are those of fp32 but for about 2^-22, and as fp32 elsewhere.

    Triton's interpreter multiplies bf16 as fp32, with equal products.
    """
    if interpreting():
        return {"PRODUCTS": tl.float32, "PRECISION": "ieee"}
    if dtype == torch.bfloat16:
        return {"PRODUCTS": tl.bfloat16, "PRECISION": "ieee"}
    backend = triton.runtime.driver.active.get_current_target().backend
    return {"PRODUCTS": tl.float32, "PRECISION": "tf32x3" if backend == "cuda" else "ieee"}


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))
