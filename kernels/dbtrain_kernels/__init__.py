"""Fused operations of dbtrain. Each is optional: its plain PyTorch form is its specification, oracle and CPU path."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Op:
    """One operation: where its fused form, its specification and its contract-test inputs are, as `module:name`.

    The names are loaded on use, so that `import dbtrain_kernels` loads neither torch nor Triton. differentiable and
    mutated: the arguments that get a gradient, and those that are changed in place.
    """

    fused: str
    reference: str
    cases: str
    differentiable: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()

    def load(self, part: str) -> Callable:
        """The function that `fused`, `reference` or `cases` names."""
        module, name = getattr(self, part).split(":")
        return getattr(import_module(f"{__name__}.{module}"), name)


OPS = {
    "loss": Op("loss:loss", "reference:loss", "cases:loss", differentiable=("prediction",)),
    "noising": Op("noising:noising", "reference:noising", "cases:noising"),
    "adamw": Op(
        "adamw:adamw",
        "reference:adamw",
        "cases:adamw",
        mutated=("master", "exp_avg", "exp_avg_sq", "step_N", "ema", "compute"),
    ),
    "lora": Op("lora:lora", "reference:lora", "cases:lora", differentiable=("x", "base", "down_NRD", "up_NDR")),
}
"""Every operation by name. A row gets the contract tests and the benchmark for free."""
