"""Fused operations of dbtrain. Each is optional: its plain PyTorch form is its specification, oracle and CPU path."""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Op:
    """Everything that is known of one operation, as names `module:name` that are loaded on use.

    So this table imports neither torch nor Triton. reference: the plain form. cases: inputs of the contract tests; only
    those load it. fused: the form with a kernel. work: inputs of the benchmark. launches, flops: what each registered
    operator starts and computes, as functions of its arguments (flops: of their shapes). again: the places of arguments
    that each operator reads twice. None: there is no such part.
    differentiable: the arguments that get a gradient. mutated: the arguments that are changed in place.
    """

    reference: str
    cases: str
    fused: str | None = None
    work: str | None = None
    launches: str | None = None
    flops: str | None = None
    again: str | None = None
    differentiable: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()

    def load(self, part: str) -> Any:
        """What a part names. Without a fused form, the fused form is the plain one."""
        return resolve_name(getattr(self, part) or self.reference)


OPS = {
    "loss": Op(
        reference="dbtrain_kernels.reference:loss",
        cases="tests.kernels.test_loss:cases",
        fused="dbtrain_kernels.loss:loss",
        work="dbtrain_kernels.loss:work",
        launches="dbtrain_kernels.loss:LAUNCHES",
        differentiable=("prediction",),
    ),
    "noising": Op(
        reference="dbtrain_kernels.reference:noising",
        cases="tests.kernels.test_noising:cases",
        fused="dbtrain_kernels.noising:noising",
        work="dbtrain_kernels.noising:work",
        launches="dbtrain_kernels.noising:LAUNCHES",
    ),
    "adamw": Op(
        reference="dbtrain_kernels.reference:adamw",
        cases="tests.kernels.test_adamw:cases",
        fused="dbtrain_kernels.adamw:adamw",
        work="dbtrain_kernels.adamw:work",
        launches="dbtrain_kernels.adamw:LAUNCHES",
        mutated=("master", "exp_avg", "exp_avg_sq", "step_N", "ema", "compute"),
    ),
    "lora": Op(
        reference="dbtrain_kernels.reference:lora",
        cases="tests.kernels.test_lora:cases",
        fused="dbtrain_kernels.lora:lora",
        work="dbtrain_kernels.lora:work",
        launches="dbtrain_kernels.lora:LAUNCHES",
        flops="dbtrain_kernels.lora:FLOPS",
        differentiable=("x", "base", "down_NRD", "up_NDR"),
    ),
    "lora_group": Op(
        reference="dbtrain_kernels.reference:lora_group",
        cases="tests.kernels.test_lora_group:cases",
        fused="dbtrain_kernels.lora_group:lora_group",
        work="dbtrain_kernels.lora_group:work",
        launches="dbtrain_kernels.lora_group:LAUNCHES",
        flops="dbtrain_kernels.lora_group:FLOPS",
        differentiable=("x", "down_NGD", "up_NOR"),
    ),
    "geglu": Op(
        reference="dbtrain_kernels.reference:geglu",
        cases="tests.kernels.test_geglu:cases",
        fused="dbtrain_kernels.geglu:geglu",
        work="dbtrain_kernels.geglu:work",
        launches="dbtrain_kernels.geglu:LAUNCHES",
        differentiable=("x",),
    ),
    "swiglu": Op(
        reference="dbtrain_kernels.reference:swiglu",
        cases="tests.kernels.test_swiglu:cases",
        fused="dbtrain_kernels.swiglu:swiglu",
        work="dbtrain_kernels.swiglu:work",
        launches="dbtrain_kernels.swiglu:LAUNCHES",
        differentiable=("gate", "value"),
    ),
    "group_norm": Op(
        reference="dbtrain_kernels.reference:group_norm",
        cases="tests.kernels.test_group_norm:cases",
        fused="dbtrain_kernels.group_norm:group_norm",
        work="dbtrain_kernels.group_norm:work",
        launches="dbtrain_kernels.group_norm:LAUNCHES",
        again="dbtrain_kernels.group_norm:AGAIN",
        differentiable=("x",),
    ),
    "rotary": Op(
        reference="dbtrain_kernels.reference:rotary",
        cases="tests.kernels.test_rotary:cases",
        fused="dbtrain_kernels.rotary:rotary",
        work="dbtrain_kernels.rotary:work",
        launches="dbtrain_kernels.rotary:LAUNCHES",
        differentiable=("x",),
    ),
    "residual_norm": Op(
        reference="dbtrain_kernels.reference:residual_norm",
        cases="tests.kernels.test_residual_norm:cases",
        fused="dbtrain_kernels.residual_norm:residual_norm",
        work="dbtrain_kernels.residual_norm:work",
        launches="dbtrain_kernels.residual_norm:LAUNCHES",
        differentiable=("x", "y"),
    ),
}
"""Every operation by name. A row gets the contract tests and the benchmark for free."""


def of_operators(part: str) -> dict[str, Any]:
    """The `launches`, `flops` or `again` of all operations in one table, by the name of the registered operator."""
    tables = [op.load(part) for op in OPS.values() if getattr(op, part)]
    return {name: function for table in tables for name, function in table.items()}
