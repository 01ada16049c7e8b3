"""AdamW over rows: norm, clip, update, decay and EMA of every subject's row of an arena, each by its own settings."""

import torch
from torch import Tensor

from dbtrain_kernels import reference
from dbtrain_kernels.dispatch import choose, dtype_problem


def adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step_N: Tensor,
    lr_N: Tensor,
    clip_N: Tensor,
    decay_N: Tensor,
    active_N: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    ema: Tensor | None = None,
    ema_decay: float = 0.0,
    compute: Tensor | None = None,
    rounding_N2: Tensor | None = None,
) -> Tensor:
    """What `reference.adamw` is; on a GPU in three launches: partial norms, factors of each row, the update."""
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema}
    weights = {"master": master, "grad": grad}
    problem = (
        dtype_problem((torch.float32,), **moments)
        or dtype_problem((torch.float32, torch.bfloat16), **weights)
        or dtype_problem((torch.bfloat16,), compute=compute)
        or _layout_problem(**weights, **moments, compute=compute)
    )
    settings = (step_N, lr_N, clip_N, decay_N, active_N, beta1, beta2, eps)
    run = adamw_op if choose("adamw", master.device.type, problem).fused else reference.adamw
    return run(master, grad, exp_avg, exp_avg_sq, *settings, ema, ema_decay, compute, rounding_N2)


def _layout_problem(**arenas: Tensor | None) -> str | None:
    for name, arena in arenas.items():
        if arena is not None and not arena.is_contiguous():
            return f"{name} is not contiguous, and arenas are changed in place"
        if arena is not None and arena.shape[1] >= 2**31:
            return f"{name} has {arena.shape[1]} elements in a row, and the kernel counts to 2^31 - 1"
        if arena is not None and len(arena) >= 2**16:
            return f"{name} has {len(arena)} rows, and a grid's second side ends at 65,535"
    return None


MUTATED = ("master", "exp_avg", "exp_avg_sq", "step_N", "ema", "compute")


@torch.library.custom_op("dbtrain::adamw", mutates_args=MUTATED)
def adamw_op(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step_N: Tensor,
    lr_N: Tensor,
    clip_N: Tensor,
    decay_N: Tensor,
    active_N: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    ema: Tensor | None,
    ema_decay: float,
    compute: Tensor | None,
    rounding_N2: Tensor | None,
) -> Tensor:
    """norm_N, after the update in place."""
    from dbtrain_kernels.adamw_triton import launch

    settings = (lr_N.contiguous(), clip_N.contiguous(), decay_N.contiguous(), active_N.contiguous())
    key_N2 = None if rounding_N2 is None else rounding_N2.long().contiguous()
    constants = (beta1, beta2, eps)
    return launch(master, grad, exp_avg, exp_avg_sq, step_N, *settings, *constants, ema, ema_decay, compute, key_N2)


@adamw_op.register_fake
def _(master, *others):
    return master.new_empty(len(master), dtype=torch.float32)
