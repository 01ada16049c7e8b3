"""Triton kernels of the fused loss. Two launches: elements (one read of everything), then the small sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a partial sum: a constant, so that a sample's bits depend on nothing but the sample."""


@triton.jit
def loss_elements(
    prediction, clean, noise, alpha, sigma, weight, mask, gradient, partial, elements, plane, slope,
    PARAMETERIZATION: tl.constexpr, MASKED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[b, chunk] = sum of mask * (f - y)^2, gradient = W_b * slope * mask * (f - y), slope = 2 / elements."""
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    at = sample * elements + place
    f = tl.load(prediction + at, mask=inside, other=0.0).to(tl.float32)
    if PARAMETERIZATION == "epsilon":
        y = tl.load(noise + at, mask=inside, other=0.0)
    elif PARAMETERIZATION == "sample":
        y = tl.load(clean + at, mask=inside, other=0.0)
    else:
        x = tl.load(clean + at, mask=inside, other=0.0)
        eps = tl.load(noise + at, mask=inside, other=0.0)
        if PARAMETERIZATION == "flow":
            y = eps - x
        else:
            y = tl.load(alpha + sample) * eps - tl.load(sigma + sample) * x
    residual = tl.where(inside, f - y, 0.0)
    scaled = residual
    if MASKED:
        scaled = residual * tl.load(mask + sample * plane + place % plane, mask=inside, other=0.0)
    tl.store(partial + sample * tl.num_programs(1) + chunk, tl.sum(scaled * residual, 0))
    if GRADIENT:
        slope_of_sample = tl.load(weight + sample) * slope
        tl.store(gradient + at, (scaled * slope_of_sample).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def loss_sums(
    partial, weight, subject, per_sample, per_subject, total, samples, subjects, chunks, inverse,
    MANY: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Program n < subjects sums its subject, the last one everything; samples in order, one after another.

    Another subject's sample is left out by `where`, so a NaN stays with its subject, and adding the zero in its place
    is exact: a subject's bits do not depend on its neighbours or on its place in the pack.
    """
    me = tl.program_id(0)
    place = tl.arange(0, CHUNKS)
    running = tl.full([], 0.0, tl.float32)
    for b in range(samples):
        parts = tl.load(partial + b * chunks + place, mask=place < chunks, other=0.0)
        mean = tl.sum(parts, 0) * inverse
        weighted = mean * tl.load(weight + b)
        if MANY:
            mine = (tl.load(subject + b) == me) | (me == subjects)
            weighted = tl.where(mine, weighted, 0.0)
        running += weighted
        tl.store(per_sample + b, mean, mask=me == subjects)
    tl.store(per_subject + me, running, mask=me < subjects)
    tl.store(total, running, mask=me == subjects)


def launch(
    prediction: Tensor, clean: Tensor, noise: Tensor, alpha_B: Tensor, sigma_B: Tensor, weight_B: Tensor,
    parameterization: str, subject_B: Tensor | None, subjects: int, mask: Tensor | None, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(total, per_sample_B, per_subject_N, gradient) of contiguous tensors; see `loss.loss_op`."""
    samples, elements = len(clean), clean[0].numel()
    plane = mask[0].numel() if mask is not None else elements
    chunks = triton.cdiv(elements, BLOCK)
    gradient = torch.empty_like(prediction) if with_gradient else prediction.new_empty(0)
    partial = clean.new_empty((samples, chunks))
    per_sample_B, per_subject_N, total = clean.new_empty(samples), clean.new_empty(subjects), clean.new_empty(())
    loss_elements[(samples, chunks)](
        prediction, clean, noise, alpha_B, sigma_B, weight_B, clean if mask is None else mask, gradient, partial,
        elements, plane, 2.0 / elements,
        PARAMETERIZATION=parameterization, MASKED=mask is not None, GRADIENT=with_gradient, BLOCK=BLOCK,
    )  # fmt: skip
    loss_sums[(subjects + 1,)](
        partial, weight_B, weight_B if subject_B is None else subject_B, per_sample_B, per_subject_N, total,
        samples, subjects, chunks, 1.0 / elements,
        MANY=subject_B is not None, CHUNKS=triton.next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip
    return total, per_sample_B, per_subject_N, gradient
