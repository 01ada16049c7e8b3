"""Triton kernels of AdamW over rows: partial norms, factors of each row, the update. No host sync, no atomics."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbtrain_kernels.noising_triton import in_element_order, philox_words
from dbtrain_kernels.reference import ROUNDING

NORM_BLOCK = 8192
BLOCK = 1024
FACTORS = 5
"""Numbers that `row_factors` leaves for `update_rows`: clip, keep, rate, spread, whether the row is updated."""


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
    """norm, and the row's scalars, in float64 because 1 - beta^t cancels; counts the row's step up."""
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
def random_bits(key, step, row, BLOCK: tl.constexpr, ROUNDING: tl.constexpr):
    """int32 [BLOCK] in [0, 2^16): as `reference.round_at_random` draws them for one block of a row."""
    counter = (tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    k0, k1 = tl.load(key + 2 * row).to(tl.uint32), tl.load(key + 2 * row + 1).to(tl.uint32)
    zero = counter * 0
    w0, w1, w2, w3 = philox_words(k0, k1, counter, zero, tl.load(step + row).to(tl.uint32), zero + ROUNDING)
    return in_element_order(w0, w1, w2, w3, BLOCK // 4).to(tl.int32, bitcast=True) & 0xFFFF


@triton.jit
def rounded_at_random(value, random):
    """fp32 numbers that are exact in bf16."""
    cut = ((value.to(tl.int32, bitcast=True) + random) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) <= 3.4028234663852886e38, cut, value)


@triton.jit
def update_rows(
    master, grad, exp_avg, exp_avg_sq, ema, compute, key, step, factors, elements,
    BETA2: tl.constexpr, REST1: tl.constexpr, REST2: tl.constexpr, EPS: tl.constexpr, EMA_REST: tl.constexpr,
    EMA: tl.constexpr, COMPUTE: tl.constexpr, RANDOM: tl.constexpr, ROUNDING: tl.constexpr,
    FACTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW and EMA of one block of a row; a row that is not updated is neither read nor written."""
    row = tl.program_id(1).to(tl.int64)
    at = factors + row * FACTORS
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tl.where(tl.load(at + 4) > 0.5, elements, 0)
    place = row * elements + place
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * tl.load(at)
    mean = tl.load(exp_avg + place, mask=inside, other=0.0)
    mean += (g - mean) * REST1
    square = tl.load(exp_avg_sq + place, mask=inside, other=0.0) * BETA2 + g * g * REST2
    value = tl.load(master + place, mask=inside, other=0.0).to(tl.float32)
    denominator = tl.sqrt_rn(square) * tl.load(at + 3) + EPS
    value = value * tl.load(at + 1) - tl.div_rn(tl.load(at + 2) * mean, denominator)
    tl.store(exp_avg + place, mean, mask=inside)
    tl.store(exp_avg_sq + place, square, mask=inside)
    weight = value
    if RANDOM:
        weight = rounded_at_random(value, random_bits(key, step, row, BLOCK, ROUNDING))
    if master.dtype.element_ty == tl.float32:
        tl.store(master + place, value, mask=inside)
    else:
        tl.store(master + place, weight.to(master.dtype.element_ty), mask=inside)
    if COMPUTE:
        tl.store(compute + place, weight.to(compute.dtype.element_ty), mask=inside)
    if EMA:
        average = tl.load(ema + place, mask=inside, other=0.0)
        tl.store(ema + place, average + (value - average) * EMA_REST, mask=inside)


def log(beta: float) -> float:
    """Natural logarithm of a decay; of 0 a number whose exponential is 0, also times a step count."""
    return math.log(beta) if beta else -1e4


def grid(rows: int, elements: int, block: int) -> tuple[int, int]:
    """Programs of a pass over arenas: (blocks of a row, rows). CUDA counts the first side to 2^31 - 1, the second only
    to 65,535, and a fully trained model is one row of 10^9 elements."""
    return triton.cdiv(elements, block), rows


def launch(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step_N: Tensor, lr_N: Tensor, clip_N: Tensor,
    decay_N: Tensor, active_N: Tensor, beta1: float, beta2: float, eps: float, ema: Tensor | None, ema_decay: float,
    compute: Tensor | None, key_N2: Tensor | None,
) -> Tensor:  # fmt: skip
    """norm_N after the update in place of contiguous arenas; see `adamw.adamw_op`."""
    rows, elements = master.shape
    chunks = triton.cdiv(elements, NORM_BLOCK)
    partial, norm_N = exp_avg.new_empty((rows, chunks)), exp_avg.new_empty(rows)
    factors = exp_avg.new_empty((rows, FACTORS))
    squared_norms[grid(rows, elements, NORM_BLOCK)](grad, partial, elements, BLOCK=NORM_BLOCK, num_warps=8)
    row_factors[(rows,)](
        partial, norm_N, step_N, lr_N, clip_N, decay_N, active_N.view(torch.uint8), factors, chunks,
        LOG_BETA1=log(beta1), LOG_BETA2=log(beta2), FACTORS=FACTORS, BLOCK=1024,
    )  # fmt: skip
    update_rows[grid(rows, elements, BLOCK)](
        master, grad, exp_avg, exp_avg_sq, exp_avg if ema is None else ema, master if compute is None else compute,
        step_N if key_N2 is None else key_N2, step_N, factors, elements,
        BETA2=beta2, REST1=1 - beta1, REST2=1 - beta2, EPS=eps, EMA_REST=1 - ema_decay,
        EMA=ema is not None, COMPUTE=compute is not None, RANDOM=key_N2 is not None, ROUNDING=ROUNDING,
        FACTORS=FACTORS, BLOCK=BLOCK,
    )  # fmt: skip
    return norm_N
