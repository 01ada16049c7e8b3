"""Published peaks of graphics cards."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """Published peaks of a card: dense matrix products in TFLOP/s (bf16 with sums in fp32; fp32 where there is no
    bf16), memory in TB/s and GiB."""

    tflops: float
    tbytes: float
    gib: float
    dtype: torch.dtype = torch.bfloat16


CARDS = {
    "H200": Card(989, 4.8, 131), "H100": Card(989, 3.35, 74.5), "A100": Card(312, 2.04, 74.5),
    "L40S": Card(362, 0.864, 44.7), "4090": Card(165, 1.008, 22.4), "T4": Card(8.1, 0.32, 14.9, torch.float32),
    "MI300X": Card(1307, 5.3, 179),
}  # fmt: skip
"""From the makers' data sheets: SXM forms, without sparsity; vendors' GB are given as GiB."""
