"""Floating-point operations of a step, our own operations included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import dbtrain_kernels.lora  # noqa: F401  registers the operations that are counted


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of a step; a multiplication and an addition are two.

    Our operations count as the matrix products that they are, and attention as PyTorch's, whoever computes it.
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        step()
    return counter.get_total_flops()


def _lora_flops(x: Any, base: Any, down: Any, up: Any, *_: Any, **__: Any) -> int:
    tokens = math.prod(x[:-1])
    return 2 * tokens * down[1] * (down[2] + up[1])


def _lora_backward_flops(grad: Any, small: Any, x: Any, down: Any, up: Any, *_: Any, **__: Any) -> int:
    return 2 * _lora_flops(x, grad, down, up)


FORMULAS = {
    torch.ops.dbtrain.lora: _lora_flops,
    torch.ops.dbtrain.lora_backward: _lora_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""What PyTorch's counter does not know, by the shapes of the arguments."""
