"""Triton kernels of the fused loss: first the elements, in one read of everything, then the small sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a partial sum: a constant, so that a sample's bits depend on the sample alone."""


@triton.jit
def loss_elements(
    prediction, clean, noise, alpha, sigma, weight, mask, gradient, partial, elements, plane, slope,
    PARAMETERIZATION: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[b, chunk] = sum of mask * (f - y)^2, gradient = W_b * slope * mask * (f - y), slope = 2 / elements.

    Triton cannot call `reference.TARGETS`, so each parameterization has its branch here, which the contract tests
    compare with the table.
    """
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
    slope_of_sample = tl.load(weight + sample) * slope
    tl.store(gradient + at, (scaled * slope_of_sample).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def loss_sums(partial, weight, per_sample, total, samples, chunks, inverse, CHUNKS: tl.constexpr):
    """Mean of each sample, and the weighted sum of the samples, one after another in their order."""
    place = tl.arange(0, CHUNKS)
    running = tl.full([], 0.0, tl.float32)
    for b in range(samples):
        parts = tl.load(partial + b * chunks + place, mask=place < chunks, other=0.0)
        mean = tl.sum(parts, 0) * inverse
        running += mean * tl.load(weight + b)
        tl.store(per_sample + b, mean)
    tl.store(total, running)


def launch(
    prediction: Tensor, clean: Tensor, noise: Tensor, alpha_B: Tensor, sigma_B: Tensor, weight_B: Tensor,
    parameterization: str, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(total, per_sample_B, d total / d prediction in its dtype), of contiguous tensors."""
    samples, elements = len(clean), clean[0].numel()
    plane = mask[0].numel() if mask is not None else elements
    chunks = triton.cdiv(elements, BLOCK)
    gradient, sums = torch.empty_like(prediction), clean.new_empty((samples, chunks))
    per_sample_B, total = clean.new_empty(samples), clean.new_empty(())
    loss_elements[(samples, chunks)](
        prediction, clean, noise, alpha_B, sigma_B, weight_B, clean if mask is None else mask, gradient, sums,
        elements, plane, 2.0 / elements,
        PARAMETERIZATION=parameterization, MASKED=mask is not None, BLOCK=BLOCK,
    )  # fmt: skip
    loss_sums[(1,)](
        sums, weight_B, per_sample_B, total, samples, chunks, 1.0 / elements,
        CHUNKS=triton.next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip
    return total, per_sample_B, gradient
