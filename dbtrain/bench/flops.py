"""Floating-point operations of a step, our own operations included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dbtrain_kernels import of_operators


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of a step; a multiplication and an addition are two.

    Our operations count as the matrix products that they are, and attention as PyTorch's, whoever computes it.
    """
    ours = {getattr(torch.ops.dbtrain, name): flops for name, flops in of_operators("flops").items()}
    with FlopCounterMode(display=False, custom_mapping=ATTENTION | ours) as counter:
        step()
    return counter.get_total_flops()


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""Attentions that PyTorch's counter does not know, by the shapes of the arguments."""
