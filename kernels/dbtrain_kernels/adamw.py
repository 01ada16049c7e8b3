"""AdamW over rows of arenas: norm, clip, update, decay and EMA of every subject by that subject's settings."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbtrain_kernels import OPS, reference
from dbtrain_kernels.cases import Case, seeded
from dbtrain_kernels.dispatch import choose, dtype_problem

LAUNCHES = {"adamw": lambda *_: 3}


def adamw(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step_N: Tensor, lr_N: Tensor, clip_N: Tensor,
    decay_N: Tensor, active_N: Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
    ema: Tensor | None = None, ema_decay: float = 0.0, compute: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `reference.adamw` is; on a GPU in three launches: partial norms, factors of each row, the update."""
    problem = (
        dtype_problem((torch.float32,), master=master, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, ema=ema)
        or dtype_problem((torch.float32, torch.bfloat16), grad=grad)
        or dtype_problem((torch.bfloat16,), compute=compute)
    )
    settings = [setting_N.contiguous() for setting_N in (lr_N, clip_N, decay_N, active_N)]
    run = adamw_op if choose("adamw", master.device.type, problem).fused else reference.adamw
    constants = (beta1, beta2, eps)
    return run(master, grad, exp_avg, exp_avg_sq, step_N, *settings, *constants, ema, ema_decay, compute)


@torch.library.custom_op("dbtrain::adamw", mutates_args=OPS["adamw"].mutated)
def adamw_op(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step_N: Tensor, lr_N: Tensor, clip_N: Tensor,
    decay_N: Tensor, active_N: Tensor, beta1: float, beta2: float, eps: float, ema: Tensor | None, ema_decay: float,
    compute: Tensor | None,
) -> Tensor:  # fmt: skip
    """norm_N. The arenas, which must be contiguous, are updated in place."""
    from dbtrain_kernels.adamw_triton import launch

    settings = step_N, lr_N, clip_N, decay_N, active_N
    return launch(master, grad, exp_avg, exp_avg_sq, *settings, beta1, beta2, eps, ema, ema_decay, compute)


@adamw_op.register_fake
def _(master, *others):
    return master.new_empty(len(master), dtype=torch.float32)


ARENAS = {"LoRA r16, 1": (1, 3_190_000), "LoRA r16, 16": (16, 3_190_000)}
"""Rows and elements of a row: an adapter of rank 16 on the attention of SD1.5, of one subject and of 16."""


def inputs(
    rows: int = 3, elements: int = 1037, ema: bool = False, compute: bool = False, device: str = "cpu", **options: Any
) -> dict[str, Any]:
    """Keyword arguments. compute: whether the gradient is bf16 and a bf16 copy follows the masters."""
    drawn: dict[str, Any] = {"generator": seeded(device, 3), "device": device}
    settings = torch.rand((3, rows), **drawn)
    arguments = {
        "master": torch.randn((rows, elements), **drawn),
        "grad": torch.randn((rows, elements), **drawn),
        "exp_avg": torch.randn((rows, elements), **drawn) * 0.1,
        "exp_avg_sq": torch.rand((rows, elements), **drawn) * 0.01,
        "step_N": torch.arange(rows, device=device) * 7,
        "lr_N": settings[0] + 0.1,
        "clip_N": settings[1] * elements**0.5 * 2,  # clips about half of the rows
        "decay_N": settings[2],
        "active_N": torch.ones(rows, dtype=torch.bool, device=device),
    }
    if ema:
        arguments |= {"ema": torch.randn((rows, elements), **drawn), "ema_decay": 0.99}
    if compute:
        arguments |= {"compute": arguments["master"].bfloat16(), "grad": arguments["grad"].bfloat16()}
    return arguments | options


def work() -> list[Case]:
    """fp32 arenas. Bytes: g is read twice (norm, update); p, m and v are read and written."""
    return [Case(name, partial(inputs, *sides), moved=math.prod(sides) * 8 * 4) for name, sides in ARENAS.items()]
