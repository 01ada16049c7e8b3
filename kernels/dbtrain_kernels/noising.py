"""Fused noising: from VAE moments to clean latents, noise and x_t in one pass, drawing every number in the kernel."""

import torch
from torch import Tensor

from dbtrain_kernels import reference
from dbtrain_kernels.dispatch import choose, dtype_problem
from dbtrain_kernels.reference import Noised


def noising(
    moments: Tensor,
    key_B2: Tensor,
    slot_B: Tensor,
    step_B: Tensor,
    alpha_B: Tensor,
    sigma_B: Tensor,
    purposes: tuple[int, int, int],
    scale: float = 1.0,
    shift: float = 0.0,
    noise_offset: float = 0.0,
    row_B: Tensor | None = None,
) -> Noised:
    """What `reference.noising` is: the same Philox words; normal numbers within 13 * 2^-24, relative (docs/kernels.md).

    Not differentiable: the VAE is frozen.
    """
    problem = dtype_problem((torch.float32,), moments=moments)
    arguments = (moments, key_B2, slot_B, step_B, alpha_B, sigma_B, purposes, scale, shift, noise_offset, row_B)
    if not choose("noising", moments.device.type, problem).fused:
        return reference.noising(*arguments)
    return Noised(*noising_op(*arguments[:6], list(purposes), *arguments[7:]))


@torch.library.custom_op("dbtrain::noising", mutates_args=())
def noising_op(
    moments: Tensor,
    key_B2: Tensor,
    slot_B: Tensor,
    step_B: Tensor,
    alpha_B: Tensor,
    sigma_B: Tensor,
    purposes: list[int],
    scale: float,
    shift: float,
    noise_offset: float,
    row_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(clean, noise, noisy), each [B, C, H, W] in fp32."""
    from dbtrain_kernels.noising_triton import launch

    return launch(
        moments.contiguous(),
        key_B2.long().contiguous(),
        slot_B.long().contiguous(),
        step_B.long().contiguous(),
        alpha_B.float().contiguous(),
        sigma_B.float().contiguous(),
        purposes,
        scale,
        shift,
        noise_offset,
        None if row_B is None else row_B.contiguous(),
    )


@noising_op.register_fake
def _(moments, key_B2, slot_B, step_B, alpha_B, sigma_B, purposes, scale, shift, noise_offset, row_B):
    shape = (len(slot_B), moments.shape[1] // 2, *moments.shape[2:])
    return moments.new_empty(shape), moments.new_empty(shape), moments.new_empty(shape)
