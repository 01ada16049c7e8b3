"""Which implementation of an operation runs on a device, and why."""

import sys
import warnings
from typing import NamedTuple

import torch
from torch import Tensor


class Choice(NamedTuple):
    """Whether the fused kernel runs, and the reason in words, for telemetry."""

    fused: bool
    reason: str


def choose(name: str, device_type: str, problem: str | None = None) -> Choice:
    """The implementation of operation `name` on a kind of device. problem: why its kernel cannot take these arguments.

    On a CPU the plain form is the intended one. On a GPU it is a fall-back, and this function warns. A CPU runs the
    kernel only where Triton is loaded with its interpreter on, which is for tests.
    """
    if device_type == "cpu" and not interpreting():
        return Choice(False, "plain PyTorch is the CPU form")
    if device_type == "meta" and problem is None:
        return Choice(True, "shapes only")
    if problem is None and device_type not in ("cpu", "cuda"):
        problem = f"there is no kernel for {device_type} devices"
    problem = problem or triton_problem()
    if problem is None:
        return Choice(True, "Triton's interpreter is on" if device_type == "cpu" else "Triton kernel")
    if device_type == "cuda":
        warnings.warn(f"dbtrain_kernels: {name} runs as plain PyTorch, because {problem}", stacklevel=2)
    return Choice(False, problem)


# torch.compiler.assume_constant_result (torch 2.13) sets this mark; calling it would load torch.compile and Triton.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def interpreting() -> bool:
    """Whether Triton is loaded and interprets kernels on CPU tensors; never loads Triton itself."""
    triton = sys.modules.get("triton")
    return triton is not None and bool(triton.knobs.runtime.interpret)


def triton_problem() -> str | None:
    """Why Triton cannot be used here, or None."""
    try:
        import triton  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"Triton does not load ({type(error).__name__}: {error}); install the triton package"
    return None


def dtype_problem(allowed: tuple[torch.dtype, ...], **tensors: Tensor | None) -> str | None:
    """Which tensor has a dtype that the kernel does not take, or None."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not {wanted}"
    return None
