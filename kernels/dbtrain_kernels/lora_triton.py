"""Triton kernels of the stacked LoRA update: shrink, expand, and sums over tokens. No host sync, no atomics.

Rows of x and y are tokens of one adapter's segment; a program works on one adapter (`me`). fp32 masters are rounded to
the dtype of the tokens in registers, so that no cast is launched and the tensor cores are used.

Several layers that read one x lie side by side: A is [N, G, D] with G the sum of their ranks, B is [N, O, R] with O the
sum of their widths. Products with A are dense, in blocks of at most MAX_BLOCK of the G columns. Products with B are
made layer by layer (`LAYERS`): block b is layer b, whose columns of the output begin at `starts[b]`.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

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
MAX_BLOCK = 128
"""Most columns of a low-rank factor whose sums a program keeps in its registers."""
BLOCK = 1024
"""Elements of a matrix whose parts one program adds."""


@triton.jit
def columns_of(starts, block, width, LAYERS: tl.constexpr, ALIGN: tl.constexpr):
    """(first, end) of the columns of a wide matrix that a block has: those of its layer, or all."""
    first, end = 0, width
    if LAYERS:
        first = tl.multiple_of(tl.load(starts + block), ALIGN)
        end = tl.multiple_of(tl.load(starts + block + 1), ALIGN)
    return first, end


@triton.jit
def shrink(
    wide, matrix, scale, small, starts, tokens, width, rank, deep, blocks, matrix_stride, matrix_width_stride,
    matrix_rank_stride, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr,
    LAYERS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """small[n, t, c] = scale_n * sum_w wide[n, t, w] matrix[n, w, r]: c is r dense, and block * rank + r by layer."""
    me, block = (tl.program_id(1) // blocks).to(tl.int64), tl.program_id(1) % blocks
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    c = block * rank + tl.arange(0, RANK)
    live = (tl.arange(0, RANK) < rank) & (c < deep)
    r = tl.arange(0, RANK) if LAYERS else c
    first, end = columns_of(starts, block, width, LAYERS, ALIGN)
    rows = wide + me * tokens * width + t[:, None].to(tl.int64) * width
    columns = matrix + me * matrix_stride + r[None, :] * matrix_rank_stride
    sums = tl.zeros([TILE, RANK], tl.float32)
    for start in range(first, end, TILE):
        w = start + tl.arange(0, TILE)
        x = tl.load(rows + w[None, :], mask=(t[:, None] < tokens) & (w[None, :] < end), other=0.0)
        m = tl.load(columns + w[:, None] * matrix_width_stride, mask=(w[:, None] < end) & live[None, :], other=0.0)
        sums = tl.dot(x.to(PRODUCTS), m.to(x.dtype).to(PRODUCTS), sums, input_precision=PRECISION)
    sums = sums * tl.load(scale + me)
    at = small + me * tokens * deep + t[:, None].to(tl.int64) * deep + c[None, :]
    tl.store(at, sums, mask=(t[:, None] < tokens) & live[None, :])


@triton.jit
def expand(
    small, matrix, base, out, starts, tokens, width, rank, deep, blocks, matrix_stride, matrix_width_stride,
    matrix_rank_stride, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, DEEP: tl.constexpr,
    TILE: tl.constexpr, LAYERS: tl.constexpr, ALIGN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out[n, t, w] = base[n, t, w] + sum_r small[n, t, c] matrix[n, w, r], with c as in `shrink`."""
    me, block = (tl.program_id(2) // blocks).to(tl.int64), tl.program_id(2) % blocks
    first, end = columns_of(starts, block, width, LAYERS, ALIGN)
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    w = first + tl.program_id(1) * TILE + tl.arange(0, TILE)
    dtype = out.dtype.element_ty
    y = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, RANK, DEEP):
        r = start + tl.arange(0, DEEP)
        at = small + me * tokens * deep + t[:, None].to(tl.int64) * deep + (block * rank + r)[None, :]
        s = tl.load(at, mask=(t[:, None] < tokens) & (r[None, :] < rank), other=0.0)
        at = matrix + me * matrix_stride + r[:, None] * matrix_rank_stride + w[None, :] * matrix_width_stride
        m = tl.load(at, mask=(r[:, None] < rank) & (w[None, :] < end), other=0.0)
        y = tl.dot(s.to(dtype).to(PRODUCTS), m.to(dtype).to(PRODUCTS), y, input_precision=PRECISION)
    at = me * tokens * width + t[:, None].to(tl.int64) * width + w[None, :]
    inside = (t[:, None] < tokens) & (w[None, :] < end)
    if ADD:
        y += tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(dtype), mask=inside)


@triton.jit
def outer_block(
    small, wide, out, starts, block, me, tile, part, tokens, width, rank, deep, out_part_stride, out_stride,
    out_width_stride, out_rank_stride, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, LAYERS: tl.constexpr, ALIGN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out[part, n, w, r] = sum over a part's tokens of wide[n, t, w] small[n, t, c], added to what is there if ADD."""
    first, end = columns_of(starts, block, width, LAYERS, ALIGN)
    w = first + tile * TILE + tl.arange(0, TILE)
    c = block * rank + tl.arange(0, RANK)
    live = (tl.arange(0, RANK) < rank) & (c < deep)
    r = tl.arange(0, RANK) if LAYERS else c
    sums = tl.zeros([TILE, RANK], tl.float32)
    for start in range(0, tl.minimum(SPLIT, tokens - part * SPLIT), TILE):
        t = part * SPLIT + start + tl.arange(0, TILE)
        at = wide + me * tokens * width + t[None, :].to(tl.int64) * width + w[:, None]
        x = tl.load(at, mask=(t[None, :] < tokens) & (w[:, None] < end), other=0.0)
        at = small + me * tokens * deep + t[:, None].to(tl.int64) * deep + c[None, :]
        s = tl.load(at, mask=(t[:, None] < tokens) & live[None, :], other=0.0)
        sums = tl.dot(x.to(PRODUCTS), s.to(x.dtype).to(PRODUCTS), sums, input_precision=PRECISION)
    at = out + tl.cast(part, tl.int64) * out_part_stride + me * out_stride
    at += w[:, None].to(tl.int64) * out_width_stride + r[None, :] * out_rank_stride
    inside = (w[:, None] < end) & live[None, :]
    if ADD:
        sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def outer(
    grad_small, x, of_down, small, grad, of_up, starts, tokens, width, out_width, deep, down_rank, rank, down_blocks,
    layers, down_part_stride, down_stride, up_part_stride, up_stride, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
    DOWN_RANK: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, LAYERS: tl.constexpr,
    ALIGN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The gradients of A [N, G, D] (the first blocks) and of B [N, O, R] (the others), which need the same loop."""
    tile, part, blocks = tl.program_id(0), tl.program_id(1), down_blocks + layers
    me, block = (tl.program_id(2) // blocks).to(tl.int64), tl.program_id(2) % blocks
    if block < down_blocks:
        if tile * TILE < width:
            outer_block(
                grad_small, x, of_down, starts, block, me, tile, part, tokens, width, down_rank, deep,
                down_part_stride, down_stride, 1, width, PRODUCTS, PRECISION, DOWN_RANK, TILE, SPLIT, False, 1, ADD,
            )  # fmt: skip
    elif tile * TILE < out_width:
        outer_block(
            small, grad, of_up, starts, block - down_blocks, me, tile, part, tokens, out_width, rank, deep,
            up_part_stride, up_stride, rank, 1, PRODUCTS, PRECISION, RANK, TILE, SPLIT, LAYERS, ALIGN, ADD,
        )  # fmt: skip


@triton.jit
def add_parts(
    downs, of_down, ups, of_up, count, down_elements, up_elements, down_stride, up_stride, BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Each gradient is the sum of its `count` parts, one after another in fp32; added to what is there if ADD."""
    me, block, subjects = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.cast(tl.num_programs(1), tl.int64)
    of_downs = tl.cdiv(down_elements, BLOCK)
    if block < of_downs:
        add_block(downs, of_down, block, me, subjects, count, down_elements, down_stride, BLOCK, ADD)
    else:
        add_block(ups, of_up, block - of_downs, me, subjects, count, up_elements, up_stride, BLOCK, ADD)


@triton.jit
def add_block(
    parts, out, block, me, subjects, count, elements, out_stride, BLOCK: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """A block of a row of one of them."""
    place = block * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for part in range(count):
        at = parts + (tl.cast(part, tl.int64) * subjects + me) * elements + place
        sums += tl.load(at, mask=place < elements, other=0.0)
    at = out + me * out_stride + place
    if ADD:
        sums += tl.load(at, mask=place < elements, other=0.0).to(tl.float32)
    tl.store(at, sums.to(out.dtype.element_ty), mask=place < elements)


class Blocks(NamedTuple):
    """How the columns of a low-rank factor are shared by programs.

    rank: columns of a block, of `number` blocks. widest: most columns of the wide side that one has. starts, LAYERS,
    ALIGN: what the kernels take; without layers `starts` is not read.
    """

    rank: int
    number: int
    widest: int
    starts: Tensor
    LAYERS: bool = False
    ALIGN: int = 1

    @property
    def chosen(self) -> dict[str, Any]:
        """Constants of a kernel."""
        return {"LAYERS": self.LAYERS, "ALIGN": self.ALIGN}


def dense(deep: int, width: int, unread: Tensor) -> Blocks:
    """Blocks of a product in which every column of the factor meets every column of the wide side."""
    count = triton.cdiv(deep, MAX_BLOCK)
    return Blocks(deep if count == 1 else MAX_BLOCK, count, width, unread)


def by_layer(rank: int, widths: Sequence[int], unread: Tensor) -> Blocks:
    """A block for each layer; a single one is dense."""
    if len(widths) == 1:
        return dense(rank, widths[0], unread)
    align = 16 if all(width % 16 == 0 for width in widths) else 1
    return Blocks(rank, len(widths), max(widths), _starts(tuple(widths), unread.device), True, align)


@cache
def _starts(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the columns of each layer begin, and the end. Kept, so that no recorded step waits for a copy."""
    return torch.tensor([sum(widths[:layer]) for layer in range(len(widths) + 1)], dtype=torch.int32, device=device)


def forward(
    x: Tensor, base: Tensor, out: Tensor, down_NGD: Tensor, up_NOR: Tensor, scale_N: Tensor, widths: Sequence[int]
) -> Tensor:
    """scale_n A_n x as fp32 [N, T, G], which backward needs; writes base + scale_n B_n A_n x into `out`, which may be
    `base`. widths: of the layers, side by side in `base`. Layouts are those of `lora_op`."""
    _, deep, width = down_NGD.shape
    small_NTG = shrunk(x, down_NGD, scale_N, deep, dense(deep, width, scale_N), (1, width))
    rank = up_NOR.shape[2]
    expanded(small_NTG, up_NOR, base, out, by_layer(rank, widths, scale_N), (rank, 1))
    return small_NTG


def backward(
    grad: Tensor, small_NTG: Tensor, x: Tensor, down_NGD: Tensor, up_NOR: Tensor, scale_N: Tensor,
    widths: Sequence[int], of_x: Tensor | None, of_down: Tensor, of_up: Tensor, add: bool, split: int,
) -> None:  # fmt: skip
    """Gradients for that of the output and what `forward` kept, into `of_x` unless it is None, `of_down` and `of_up`:
    added to what they hold, or put in its place. Rows of the last two may lie apart, as in an arena."""
    _, deep, width = down_NGD.shape
    rank = up_NOR.shape[2]
    layers = by_layer(rank, widths, scale_N)
    grad_NTG = shrunk(grad, up_NOR, scale_N, deep, layers, (rank, 1))
    if of_x is not None:
        expanded(grad_NTG, down_NGD, of_x if add else None, of_x, Blocks(deep, 1, width, scale_N), (1, width))
    outer_sums(grad_NTG, x, of_down, small_NTG, grad, of_up, layers, add, split)


def shrunk(
    wide: Tensor, matrix: Tensor, scale_N: Tensor, deep: int, blocks: Blocks, strides: tuple[int, int]
) -> Tensor:
    """scale * wide @ matrix, [N, T, G]; strides are (width, rank) of the matrix."""
    subjects, width = len(scale_N), wide.shape[-1]
    tokens, tile = wide.numel() // width // subjects, TILES[wide.dtype]
    small_NTG = wide.new_empty((subjects, tokens, deep), dtype=torch.float32)
    shrink[(triton.cdiv(tokens, tile), subjects * blocks.number)](
        wide, matrix, scale_N, small_NTG, blocks.starts, tokens, width, blocks.rank, deep, blocks.number,
        matrix.stride(0), *strides, RANK=_padded(blocks.rank), TILE=tile, **blocks.chosen, **_products(wide.dtype),
    )  # fmt: skip
    return small_NTG


def expanded(
    small_NTG: Tensor, matrix: Tensor, base: Tensor | None, out: Tensor, blocks: Blocks, strides: tuple[int, int]
) -> None:
    """out = base + small @ matrix^T; strides are (width, rank) of the matrix."""
    subjects, tokens, deep = small_NTG.shape
    width, tile, rank = out.shape[-1], TILES[out.dtype], _padded(blocks.rank)
    expand[(triton.cdiv(tokens, tile), triton.cdiv(blocks.widest, tile), subjects * blocks.number)](
        small_NTG, matrix, out if base is None else base, out, blocks.starts, tokens, width, blocks.rank, deep,
        blocks.number, matrix.stride(0), *strides, RANK=rank, DEEP=_depth(rank, out.dtype), TILE=tile,
        ADD=base is not None, **blocks.chosen, **_products(out.dtype),
    )  # fmt: skip


def outer_sums(
    grad_NTG: Tensor, x: Tensor, of_down: Tensor, small_NTG: Tensor, grad: Tensor, of_up: Tensor, layers: Blocks,
    add: bool, split: int,
) -> None:  # fmt: skip
    """of_down = grad_small^T @ x and of_up = grad^T @ small, or that added to them: parts of `split` tokens, then the
    sum of the parts."""
    subjects, tokens, deep = small_NTG.shape
    width, out_width, tile, parts = x.shape[-1], grad.shape[-1], TILES[x.dtype], triton.cdiv(tokens, split)
    downs = dense(deep, width, layers.starts)
    into = of_down, of_up
    if parts > 1:
        into = tuple(one.new_empty((parts, *one.shape), dtype=torch.float32) for one in into)  # type: ignore[assignment]
    strides = [stride for one in into for stride in (one.stride(0), one.stride(-3))]
    outer[(triton.cdiv(max(width, layers.widest), tile), parts, subjects * (downs.number + layers.number))](
        grad_NTG, x, into[0], small_NTG, grad, into[1], layers.starts, tokens, width, out_width, deep, downs.rank,
        layers.rank, downs.number, layers.number, *strides, DOWN_RANK=_padded(downs.rank), RANK=_padded(layers.rank),
        TILE=tile, SPLIT=split, ADD=add and parts == 1, **layers.chosen, **_products(x.dtype),
    )  # fmt: skip
    if parts > 1:
        elements = of_down[0].numel(), of_up[0].numel()
        add_parts[(sum(triton.cdiv(each, BLOCK) for each in elements), subjects)](
            into[0], of_down, into[1], of_up, parts, *elements, of_down.stride(0), of_up.stride(0), BLOCK=BLOCK, ADD=add
        )


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


def _depth(rank: int, dtype: torch.dtype) -> int:
    """Columns that one product of `expand` sums. Where bf16 takes several, their loads are pipelined, and the shared
    memory of sm_86 and sm_89 does not hold three stages of 128."""
    return 64 if dtype == torch.bfloat16 and rank > DEEPEST[dtype] else min(rank, DEEPEST[dtype])


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))
