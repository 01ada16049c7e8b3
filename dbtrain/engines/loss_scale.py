"""Loss scales for fp16, one for each row of a pack (a subject that trains alone is one row).

Gradients below 6e-8 are 0 in fp16 and those above 65504 infinite. So each subject's loss is multiplied by a scale
before the backward pass, and its gradient is divided by it in fp32 (arXiv 1710.03740). A gradient that overflows halves
the scale and leaves out that row's step; after `GROWTH` good steps the scale doubles. Scales are powers of two:
multiplying by them rounds nothing.
"""

import torch
from torch import Tensor

from dbtrain.settings.config import RunConfig

START, GROWTH, LEAST, MOST = 2.0**12, 200, 1.0, 2.0**24
KIND = "scaling"
"""Kind of an engine's state that keeps a row's scale, good steps since it changed, and steps left out, under `ROW`."""
ROW = "row"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Number formats by the names that settings give them."""


def resolved_precision(settings: RunConfig, device_type: str) -> RunConfig:
    """The settings with the precision that `auto` comes to on a kind of device: bf16 where it has that, else fp16 on a
    GPU; fp32 on a CPU."""
    if settings.train.precision != "auto":
        return settings
    on_gpu = device_type == "cuda"
    able = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = "bf16" if able else "fp16" if on_gpu else "fp32"
    return settings.model_copy(update={"train": settings.train.model_copy(update={"precision": precision})})


class LossScales:
    """scale_N: what each row's loss is multiplied by. good_N: steps since it changed. skipped_N: steps left out."""

    def __init__(self, rows: int, device: torch.device | str = "cpu"):
        self.scale_N = torch.full((rows,), START, device=device)
        self.good_N = torch.zeros(rows, dtype=torch.long, device=device)
        self.skipped_N = torch.zeros_like(self.good_N)

    def update(self, finite_N: Tensor, active_N: Tensor) -> Tensor:
        """Whether each active row's step is left out because its gradient overflowed, after the scales have followed.

        A gradient that is not finite at the least scale has another cause: its row is False here.
        """
        over_N = active_N & ~finite_N & (self.scale_N > LEAST)
        good_N = self.good_N + (active_N & finite_N)
        grown_N = good_N >= GROWTH
        scale_N = torch.where(grown_N, self.scale_N * 2, self.scale_N)
        self.scale_N.copy_(torch.where(over_N, self.scale_N / 2, scale_N).clamp(LEAST, MOST))
        self.good_N.copy_(torch.where(over_N | grown_N, 0, good_N))
        self.skipped_N += over_N
        return over_N

    def state(self, row: int = 0) -> dict[str, Tensor]:
        """A row's scale, good steps and left-out steps, for a checkpoint."""
        values = (self.scale_N[row], self.good_N[row], self.skipped_N[row])
        return {ROW: torch.stack([value.double() for value in values]).cpu()}

    def load(self, row: int, state: dict[str, Tensor] | None) -> None:
        """Put a row's values back; those of a fresh start where there are none."""
        scale, good, skipped = (START, 0, 0) if state is None else state[ROW].tolist()
        self.scale_N[row], self.good_N[row], self.skipped_N[row] = scale, int(good), int(skipped)
