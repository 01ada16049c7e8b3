"""Fused noising: from VAE moments to clean latents, noise and x_t in one pass, drawing every number in the kernel."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbtrain_kernels import reference
from dbtrain_kernels.cases import PACKS, Case, seeded
from dbtrain_kernels.dispatch import choose, dtype_problem
from dbtrain_kernels.reference import Noised

LAUNCHES = {"noising": lambda *_: 1}


def noising(
    moments: Tensor, key_B2: Tensor, slot_B: Tensor, step_B: Tensor, alpha_S: Tensor, sigma_S: Tensor,
    purposes: tuple[int, int, int, int, int], scale: float = 1.0, shift: float = 0.0, noise_offset: float = 0.0,
    first_S: Tensor | None = None, strata: int = 0,
) -> Noised:  # fmt: skip
    """What `reference.noising` is: the same Philox words; normal numbers within 13 * 2^-24, relative (docs/kernels.md).

    There is no backward, because the VAE is frozen. Raises ValueError where neither first_S nor strata is given.
    """
    if first_S is None and not strata:
        raise ValueError("noising: got neither first_S nor strata, want one of them")
    scalars = scale, shift, noise_offset
    problem = dtype_problem((torch.float32,), moments=moments)
    if not choose("noising", moments.device.type, problem).fused:
        named = (moments, key_B2, slot_B, step_B, alpha_S, sigma_S)
        return reference.noising(*named, purposes, *scalars, first_S, strata)
    counters = [words.long().contiguous() for words in (key_B2, slot_B, step_B)]
    tables = [table_S.float().contiguous() for table_S in (alpha_S, sigma_S)]
    first_S = None if first_S is None else first_S.contiguous()
    return Noised(*noising_op(moments.contiguous(), *counters, *tables, list(purposes), *scalars, first_S, strata))


@torch.library.custom_op("dbtrain::noising", mutates_args=())
def noising_op(
    moments: Tensor, key_B2: Tensor, slot_B: Tensor, step_B: Tensor, alpha_S: Tensor, sigma_S: Tensor,
    purposes: list[int], scale: float, shift: float, noise_offset: float, first_S: Tensor | None, strata: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(clean, noise, noisy), each [B, C, H, W] in fp32, and index_B; of contiguous tensors."""
    from dbtrain_kernels.noising_triton import launch

    scalars = scale, shift, noise_offset
    return launch(moments, key_B2, slot_B, step_B, alpha_S, sigma_S, purposes, *scalars, first_S, strata)


@noising_op.register_fake
def _(moments, key_B2, slot_B, *others):
    samples, channels, *sides = moments.shape
    made = [moments.new_empty(samples, channels // 2, *sides) for _ in range(3)]
    return *made, slot_B.new_empty(slot_B.shape)


def inputs(
    shape: tuple[int, ...] = (3, 4, 5, 7), steps: int = 50, device: str = "cpu", **options: float
) -> dict[str, Any]:
    """Keyword arguments for latents of a shape and a schedule of so many steps."""
    drawn: dict[str, Any] = {"generator": seeded(device, 2), "device": device}
    samples, channels, *sides = shape
    angle_S = torch.rand(steps, **drawn) * 1.5
    arguments: dict[str, Any] = {
        "moments": torch.randn((samples, 2 * channels, *sides), **drawn),
        "key_B2": torch.randint(0, 2**32, (samples, 2), **drawn),
        "slot_B": torch.randint(0, 2**31, (samples,), **drawn),
        "step_B": torch.randint(0, 2**31, (samples,), **drawn),
        "alpha_S": angle_S.cos(),
        "sigma_S": angle_S.sin(),
        "purposes": (3, 1, 4, 2, 9),
        **options,
    }
    if "strata" not in options:
        arguments["first_S"] = torch.randint(0, 2**32, (steps,), **drawn).sort().values
        arguments["first_S"][0] = 0
    return arguments


def work() -> list[Case]:
    """A schedule of 1000 steps. Bytes: two moments are read; x, eps and x_t are written; all fp32."""
    call = partial(inputs, steps=1000)
    return [Case(name, partial(call, shape), moved=math.prod(shape) * 5 * 4) for name, shape in PACKS.items()]
