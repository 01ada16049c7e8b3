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
    alpha_S: Tensor,
    sigma_S: Tensor,
    purposes: tuple[int, int, int, int, int],
    scale: float = 1.0,
    shift: float = 0.0,
    noise_offset: float = 0.0,
    row_B: Tensor | None = None,
    index_B: Tensor | None = None,
    first_S: Tensor | None = None,
    strata: int = 0,
) -> Noised:
    """What `reference.noising` is: the same Philox words; normal numbers within 13 * 2^-24, relative (docs/kernels.md).

    Not differentiable: the VAE is frozen.
    """
    problem = dtype_problem((torch.float32,), moments=moments)
    named = (moments, key_B2, slot_B, step_B, alpha_S, sigma_S)
    scalars, choices = (scale, shift, noise_offset), (row_B, index_B, first_S)
    if not choose("noising", moments.device.type, problem).fused:
        return reference.noising(*named, purposes, *scalars, *choices, strata)
    return Noised(*noising_op(*named, list(purposes), *scalars, *choices, strata))


@torch.library.custom_op("dbtrain::noising", mutates_args=())
def noising_op(
    moments: Tensor,
    key_B2: Tensor,
    slot_B: Tensor,
    step_B: Tensor,
    alpha_S: Tensor,
    sigma_S: Tensor,
    purposes: list[int],
    scale: float,
    shift: float,
    noise_offset: float,
    row_B: Tensor | None,
    index_B: Tensor | None,
    first_S: Tensor | None,
    strata: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(clean, noise, noisy), each [B, C, H, W] in fp32, and index_B."""
    from dbtrain_kernels.noising_triton import launch

    if index_B is None and first_S is None and not strata:
        raise ValueError("noising: got neither index_B nor first_S nor strata, want one of them")
    return launch(
        moments.contiguous(),
        key_B2.long().contiguous(),
        slot_B.long().contiguous(),
        step_B.long().contiguous(),
        alpha_S.float().contiguous(),
        sigma_S.float().contiguous(),
        purposes,
        scale,
        shift,
        noise_offset,
        None if row_B is None else row_B.long().contiguous(),
        None if index_B is None else index_B.long().contiguous(),
        None if first_S is None else first_S.contiguous(),
        strata,
    )


@noising_op.register_fake
def _(moments, key_B2, slot_B, *others):
    shape = (len(slot_B), moments.shape[1] // 2, *moments.shape[2:])
    made = [moments.new_empty(shape) for _ in range(3)]
    return *made, slot_B.new_empty(slot_B.shape, dtype=torch.long)
