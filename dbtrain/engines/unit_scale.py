"""Divisions by 1.0 are left out of a denoiser: the same numbers, without a kernel for each."""

from typing import Any

from torch import nn

DIVISORS = ("output_scale_factor", "rescale_output_factor")
"""Attributes by which diffusers' residual blocks and attentions (0.42) divide what they return; 1.0 in all published
models. x / 1.0 is x in every bit, but takes a kernel forward and another one backward."""


class One:
    """The number 1 as a divisor that returns what it divides."""

    def __rtruediv__(self, value: Any) -> Any:
        """The value itself."""
        return value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, One) or other == 1

    def __hash__(self) -> int:
        return hash(1)

    def __repr__(self) -> str:
        return "1.0"


def drop_unit_divisions(denoiser: nn.Module) -> int:
    """The number of divisors that were 1.0 and now divide nothing; others stay."""
    dropped = 0
    for module in denoiser.modules():
        for name in DIVISORS:
            if isinstance(getattr(module, name, None), (int, float)) and getattr(module, name) == 1:
                setattr(module, name, One())
                dropped += 1
    return dropped


def restore_unit_divisions(module: nn.Module) -> None:
    """Divide by the number 1.0 again: torch.compile (2.13) traces no operator with `One`, and fuses the division."""
    for part in module.modules():
        for name in DIVISORS:
            if isinstance(getattr(part, name, None), One):
                setattr(part, name, 1.0)
