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
) -> Tensor:
    """What `reference.adamw` is; on a GPU in three launches: partial norms, factors of each row, the update."""
    arenas = {"master": master, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema}
    problem = dtype_problem((torch.float32,), **arenas) or _layout_problem(**arenas)
    settings = (step_N, lr_N, clip_N, decay_N, active_N, beta1, beta2, eps)
    run = adamw_op if choose("adamw", master.device.type, problem).fused else reference.adamw
    return run(master, grad, exp_avg, exp_avg_sq, *settings, ema, ema_decay)


def _layout_problem(**arenas: Tensor | None) -> str | None:
    for name, arena in arenas.items():
        if arena is not None and not arena.is_contiguous():
            return f"{name} is not contiguous, and arenas are changed in place"
    return None


@torch.library.custom_op("dbtrain::adamw", mutates_args=("master", "exp_avg", "exp_avg_sq", "step_N", "ema"))
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
) -> Tensor:
    """norm_N, after the update in place."""
    from dbtrain_kernels.adamw_triton import launch

    settings = (lr_N.contiguous(), clip_N.contiguous(), decay_N.contiguous(), active_N.contiguous())
    return launch(master, grad, exp_avg, exp_avg_sq, step_N, *settings, beta1, beta2, eps, ema, ema_decay)


@adamw_op.register_fake
def _(master, *others):
    return master.new_empty(len(master))
