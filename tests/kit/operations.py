"""What tests of fused operations share: how far a result may be from float64, and inputs on a device."""

from typing import Any

import torch
from torch import Tensor

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7 + 2.0**-8}
"""Relative error |got - want| / |want| (2-norms) that an output of a dtype may have against float64.

float32: each element takes fewer than 16 roundings of 2^-24, and sums are trees. A processor's own products add 2,113
terms in blocks: sqrt(2113) 2^-24 = 2.7e-6 if it were one by one, 1.6e-6 the most that was seen. bfloat16, 8 significant
bits: the kernel rounds its float32 gradient (2^-8; Triton's interpreter truncates: 2^-7), and backward rounds once more
(2^-8).
"""

PRODUCT_BOUNDS = {torch.float32: 0.0, torch.bfloat16: 5 * 2.0**-7}
"""The same for any result of products whose operands are rounded to a dtype on the way: at most two matrices, a small
factor and the output or the cotangent, each by 2^-8 (truncated, in the interpreter: 2^-7)."""


def on(device: str, inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Copies of the inputs on a device, floating tensors in `dtype` where it is given."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None, copy=True)

    return {name: moved(value) for name, value in inputs.items()}
