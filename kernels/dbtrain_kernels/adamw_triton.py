"""Triton kernels of AdamW over rows: partial norms, factors of each row, the update. No host sync, no atomics."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

NORM_BLOCK = 8192
BLOCK = 1024
FACTORS = 5
"""Numbers of a row that `row_factors` writes for `update_rows`: clip, keep, rate, spread, whether to update it."""


@triton.jit
def squared_norms(grad, partial, elements, BLOCK: tl.constexpr):
    """partial[row, chunk] = sum of grad^2 over a chunk."""
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad + row * elements + place, mask=place < elements, other=0.0).to(tl.float32)
    tl.store(partial + row * tl.num_programs(0) + chunk, tl.sum(g * g, 0))


@triton.jit
def row_factors(
    partial, norm, step, lr, clip, decay, active, factors, chunks,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, FACTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the norm and the factors of a row, in float64 because 1 - beta^t cancels, and count its step up."""
    row = tl.program_id(0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, chunks, BLOCK):
        place = start + tl.arange(0, BLOCK)
        sums += tl.load(partial + row.to(tl.int64) * chunks + place, mask=place < chunks, other=0.0)
    length = tl.sqrt_rn(tl.sum(sums, 0))
    tl.store(norm + row, length)
    update = (tl.load(active + row) != 0) & (length <= 3.4028234663852886e38)
    made = tl.load(step + row)
    count = made + update.to(made.dtype)
    tl.store(step + row, count)
    t = count.to(tl.float64)
    rate = tl.load(lr + row).to(tl.float64)
    limit = tl.load(clip + row).to(tl.float64) / (length.to(tl.float64) + 1e-6)
    at = factors + row * FACTORS
    tl.store(at, tl.where(limit < 1.0, limit, 1.0).to(tl.float32))
    tl.store(at + 1, (1.0 - rate * tl.load(decay + row).to(tl.float64)).to(tl.float32))
    tl.store(at + 2, (rate / (1.0 - tl.exp(t * LOG_BETA1))).to(tl.float32))
    tl.store(at + 3, (1.0 / tl.sqrt(1.0 - tl.exp(t * LOG_BETA2))).to(tl.float32))
    tl.store(at + 4, update.to(tl.float32))


@triton.jit
def update_rows(
    master, grad, exp_avg, exp_avg_sq, ema, compute, factors, elements,
    BETA2: tl.constexpr, REST1: tl.constexpr, REST2: tl.constexpr, EPS: tl.constexpr, EMA_REST: tl.constexpr,
    EMA: tl.constexpr, COMPUTE: tl.constexpr, FACTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Make the AdamW step and the EMA of one block of a row; of a row without update, read and write nothing."""
    row = tl.program_id(1).to(tl.int64)
    at = factors + row * FACTORS
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tl.where(tl.load(at + 4) > 0.5, elements, 0)
    place = row * elements + place
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * tl.load(at)
    mean = tl.load(exp_avg + place, mask=inside, other=0.0)
    mean += (g - mean) * REST1
    square = tl.load(exp_avg_sq + place, mask=inside, other=0.0) * BETA2 + g * g * REST2
    value = tl.load(master + place, mask=inside, other=0.0)
    denominator = tl.sqrt_rn(square) * tl.load(at + 3) + EPS
    value = value * tl.load(at + 1) - tl.div_rn(tl.load(at + 2) * mean, denominator)
    tl.store(exp_avg + place, mean, mask=inside)
    tl.store(exp_avg_sq + place, square, mask=inside)
    tl.store(master + place, value, mask=inside)
    if COMPUTE:
        tl.store(compute + place, value.to(compute.dtype.element_ty), mask=inside)
    if EMA:
        average = tl.load(ema + place, mask=inside, other=0.0)
        tl.store(ema + place, average + (value - average) * EMA_REST, mask=inside)


def launch(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step_N: Tensor, lr_N: Tensor, clip_N: Tensor,
    decay_N: Tensor, active_N: Tensor, beta1: float, beta2: float, eps: float, ema: Tensor | None, ema_decay: float,
    compute: Tensor | None,
) -> Tensor:  # fmt: skip
    """norm_N. The arenas, which must be contiguous, are updated in place."""
    arenas = [arena for arena in (master, grad, exp_avg, exp_avg_sq, ema, compute) if arena is not None]
    assert all(arena.is_contiguous() for arena in arenas)
    rows, elements = master.shape
    chunks = triton.cdiv(elements, NORM_BLOCK)
    partial, norm_N = exp_avg.new_empty((rows, chunks)), exp_avg.new_empty(rows)
    factors = exp_avg.new_empty((rows, FACTORS))
    squared_norms[(chunks, rows)](grad, partial, elements, BLOCK=NORM_BLOCK, num_warps=8)
    row_factors[(rows,)](
        partial, norm_N, step_N, lr_N, clip_N, decay_N, active_N.view(torch.uint8), factors, chunks,
        LOG_BETA1=_log(beta1), LOG_BETA2=_log(beta2), FACTORS=FACTORS, BLOCK=1024,
    )  # fmt: skip
    update_rows[(triton.cdiv(elements, BLOCK), rows)](
        master, grad, exp_avg, exp_avg_sq, exp_avg if ema is None else ema, master if compute is None else compute,
        factors, elements, BETA2=beta2, REST1=1 - beta1, REST2=1 - beta2, EPS=eps, EMA_REST=1 - ema_decay,
        EMA=ema is not None, COMPUTE=compute is not None, FACTORS=FACTORS, BLOCK=BLOCK,
    )  # fmt: skip
    return norm_N


def _log(beta: float) -> float:
    """Natural logarithm of a decay; for 0 a number whose exponential is 0, as is that of its multiples."""
    return math.log(beta) if beta else -1e4
