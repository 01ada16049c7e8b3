"""Compile the kernels that training launches for GPUs that are not here: `python -m tests.kit.compiling sm_90 sm_80`.

Prints JSON, by target a list with a row for each compiled kernel. Triton has one active driver, so this takes a process
of its own, with TRITON_INTERPRET=0 and an empty TRITON_CACHE_DIR.

The project's own launchers are called with tensors on the `meta` device. Those tensors' addresses are 0, so Triton
specialises alignment, divisibility by 16 and arguments equal to 1 exactly as it does in a launch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dbtrain.objective import PARAMETERIZATIONS
from dbtrain_kernels import (
    adamw_triton,
    geglu_triton,
    group_norm_triton,
    lora_triton,
    loss_triton,
    noising_triton,
    residual_norm_triton,
    rotary_triton,
)  # fmt: skip
from dbtrain_kernels.adamw import inputs as adamw_inputs
from dbtrain_kernels.geglu import inputs as geglu_inputs
from dbtrain_kernels.group_norm import inputs as group_norm_inputs
from dbtrain_kernels.lora import SPLIT
from dbtrain_kernels.loss import inputs as loss_inputs
from dbtrain_kernels.noising import inputs as noising_inputs
from dbtrain_kernels.residual_norm import LAYERS as RESIDUALS
from dbtrain_kernels.residual_norm import by_sample
from dbtrain_kernels.residual_norm import inputs as residual_inputs
from dbtrain_kernels.rotary import inputs as rotary_inputs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""GPUs by name: A100, H100 and H200, MI300X. The last number is the threads of a warp."""

PROJECTIONS = {
    "SD1.5 self": (4096, 320, 320),
    "SD1.5 captions": (77, 768, 1280),
    "SD1.5 middle": (64, 1280, 1280),
    "SDXL feed-forward": (1024, 1280, 10240),
    "FLUX.1": (4608, 3072, 3072),
}
"""Tokens of a sample, features in and features out of adapted layers."""

GROUPS = {
    "SD1.5 q, k, v": (4096, 320, (320, 320, 320)),
    "SD1.5 captions of all layers": (77, 768, (320, 320, 640, 640, 1280, 1280) * 5),
}
"""Tokens of a sample, features in, and features out of each layer, of layers that read one input."""

FORMS = {
    "pack": (torch.bfloat16, torch.bfloat16),
    "solo": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
"""Dtypes of tokens and of the adapters' matrices: a pack in bf16, one subject in bf16, and training in fp32."""


class Nowhere:
    """What Triton (3.6, 3.7) asks of the active driver when it compiles without a launch."""

    def __init__(self, name: str):
        self.get_current_target = lambda: TARGETS[name]
        self.get_current_device = lambda: name  # a kernel's compiled forms are kept by device
        self.get_current_stream = lambda device: 0


class Compiled:
    """Compiled kernels, in the order in which they were first wanted: (the call, kernel's name, kernel)."""

    def __init__(self) -> None:
        self.kernels: dict[int, tuple[str, str, Any]] = {}
        self.call, run = "", JITFunction.run

        def warm(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            self.kernels.setdefault(id(kernel), (self.call, function.__name__, kernel))
            return kernel

        JITFunction.run = warm

    def rows(self, target: str) -> list[dict[str, Any]]:
        """A row of each kernel that training launches on a target."""
        triton.runtime.driver.set_active(Nowhere(target))
        lora_triton._products.cache_clear()  # it asks for the target
        before = len(self.kernels)
        for self.call, call in calls():
            call()
        return [row(*entry) for entry in list(self.kernels.values())[before:]]


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Whatever training launches: (label, call on the meta device). Tokens that are no multiple of 16 change nothing at
    rank 16."""
    for form, (tokens, matrices) in FORMS.items():
        for name, sides in PROJECTIONS.items():
            if name != "SD1.5 captions" or form == "pack":
                yield f"{form}, {name}, rank 16", partial(update, tokens, matrices, 16, *sides)
        # In fp32 also with tokens that are no multiple of 16.
        for name in ("SD1.5 self", "SD1.5 captions") if form == "fp32" else ("SD1.5 self",):
            yield f"{form}, {name}, rank 128", partial(update, tokens, matrices, 128, *PROJECTIONS[name])
    for name, group in GROUPS.items():
        yield f"pack, {name}, rank 16", partial(update_group, torch.bfloat16, 16, *group)
    yield "pack, SD1.5 q, k, v, rank 128", partial(update_group, torch.bfloat16, 128, *GROUPS["SD1.5 q, k, v"])
    yield "fp32, SD1.5 q, k, v, rank 16", partial(update_group, torch.float32, 16, *GROUPS["SD1.5 q, k, v"])
    times = {"t by words": {}, "t in strata": {"strata": 4}, "noise offset": {"noise_offset": 0.1}}
    for channels in (4, 16):
        for name, options in times.items():
            yield f"{channels} channels, {name}", partial(noise, (16, channels, 64, 64), **options)
    for parameterization in PARAMETERIZATIONS:
        yield f"{parameterization}, bfloat16", partial(lose, parameterization, torch.bfloat16)
    yield "v_prediction, float32", partial(lose, "v_prediction", torch.float32)  # it reads all that the others read
    for options in ({}, {"ema": True}, {"compute": True}, {"ema": True, "compute": True}):
        yield f"AdamW, {' '.join(options) or 'plain'}", partial(advance, **options)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield f"GEGLU, {dtype}", partial(gate, (4, 1024, 2 * 5120), dtype, False)
        yield f"SwiGLU, {dtype}", partial(gate, (2, 4224, 2 * 10240), dtype, True)
        yield f"rotary, FLUX.1, {dtype}", partial(turn, (2, 4608, 24, 128), dtype)
    yield "rotary, Ideogram 4", partial(turn, (2, 4160, 18, 256), torch.bfloat16, halves=True, each=True)
    options = {"shifted": True, "last": True}
    yield "norm, SD1.5, channels last", partial(normalized, (16, 320, 64, 64), torch.bfloat16, **options)
    yield "residual, Z-Image, 1", partial(add_and_norm, RESIDUALS["Z-Image, 1"][0], torch.bfloat16,
                                          **RESIDUALS["Z-Image, 1"][1])  # fmt: skip
    yield "residual, SDXL, fp32, no addition", partial(add_and_norm, (2, 1024, 1280), torch.float32, added=False)
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("SD1.5 4096 tokens, 8", "FLUX.1, 1"):
            yield f"residual, {name}, {dtype}", partial(add_and_norm, RESIDUALS[name][0], dtype, **RESIDUALS[name][1])
        yield f"norm, SDXL, channels first, {dtype}", partial(normalized, (4, 640, 64, 64), dtype, silu=False)


def update(dtype: torch.dtype, matrices: torch.dtype, rank: int, tokens: int, wide: int, out: int) -> None:
    """A layer's adapters, forward and backward; the matrices are views of an arena, as in training."""
    subjects = 8 if matrices == torch.bfloat16 else 1
    made = partial(torch.empty, device="meta")
    arena = made(subjects, 3_188_736, dtype=matrices)
    down, up = (arena[:, : rank * side] for side in (wide, out))
    down, up = down.view(subjects, rank, wide), up.view(subjects, out, rank)
    x, base = (made(2 * subjects, tokens, side, dtype=dtype) for side in (wide, out))
    scale_N = made(subjects)
    small_NTR = lora_triton.forward(x, base, torch.empty_like(base), down, up, scale_N, (out,))
    into = (torch.empty_like(like, memory_format=torch.contiguous_format) for like in (x, down, up))
    lora_triton.backward(base, small_NTR, x, down, up, scale_N, (out,), *into, False, SPLIT)


def update_group(dtype: torch.dtype, rank: int, tokens: int, wide: int, widths: tuple[int, ...]) -> None:
    """Layers that read one input, forward and backward; matrices and gradients are views of arenas."""
    arenas = [torch.empty(8, 3_188_736, device="meta", dtype=dtype) for _ in "ab"]
    deep, out = rank * len(widths), sum(widths)
    (down, up), into = (
        (arena[:, : deep * wide].view(8, deep, wide), arena[:, : out * rank].view(8, out, rank)) for arena in arenas
    )
    x, y = (torch.empty(16, tokens, side, device="meta", dtype=dtype) for side in (wide, out))
    scale_N = torch.empty(8, device="meta")
    small_NTG = lora_triton.forward(x, y, y, down, up, scale_N, widths)
    lora_triton.backward(y, small_NTG, x, down, up, scale_N, widths, torch.empty_like(x), *into, True, SPLIT)


def noise(shape: tuple[int, ...], **options: Any) -> None:
    """Noised latents of a schedule of 1000 steps."""
    given = {"scale": 0.18215, "shift": 0.0, "noise_offset": 0.0, "first_S": None, "strata": 0}
    given |= noising_inputs(shape, steps=1000, device="meta", **options)
    noising_triton.launch(**given)


def lose(parameterization: str, dtype: torch.dtype) -> None:
    """The loss and its gradient, without and with a mask."""
    for masked in (False, True):
        given = loss_inputs((16, 4, 64, 64), parameterization, dtype, masked, device="meta")
        loss_triton.launch(**{"mask": None, **given})


def advance(**options: bool) -> None:
    """An AdamW step of a pack's arenas; clip and decay are float64, as the engine has them."""
    given = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "ema": None, "ema_decay": 0.0, "compute": None}
    given |= adamw_inputs(8, 3_188_736, device="meta", **options)
    given |= {name: given[name].double() for name in ("lr_N", "clip_N", "decay_N")}
    adamw_triton.launch(**given)


def gate(shape: tuple[int, ...], dtype: torch.dtype, silu: bool) -> None:
    """A feed-forward layer's gate, forward and backward, of the halves of one projection."""
    x = geglu_inputs(shape, dtype, device="meta")["x"].view(-1, shape[-1])
    halves, into = x.chunk(2, 1), torch.empty_like(x).chunk(2, 1)
    geglu_triton.backward(geglu_triton.forward(*halves, silu), *halves, *into, silu)


def normalized(shape: tuple[int, ...], dtype: torch.dtype, **options: bool) -> None:
    """A GroupNorm of 32 groups, forward and backward."""
    given = {"shift_BC": None, **group_norm_inputs(shape, dtype, 32, device="meta", **options)}
    y, *factors = group_norm_triton.forward(**given)
    own = (given[name] for name in ("weight", "bias", "silu"))
    group_norm_triton.backward(y, given["x"], *factors, *own)


def turn(shape: tuple[int, ...], dtype: torch.dtype, **options: bool) -> None:
    """Queries' norm with rotary embedding, forward and backward; angles are every second number of a table."""
    given = rotary_inputs(shape, dtype, device="meta", **options)
    for name in ("cos", "sin"):
        given[name] = torch.empty(*given[name].shape, 2, device="meta")[..., 0]
    rotary_triton.backward(rotary_triton.forward(**given), **given)


def add_and_norm(shape: tuple[int, ...], dtype: torch.dtype, **options: bool) -> None:
    """A residual addition and the norm after it, forward and backward, as `residual_norm` starts them."""
    given = residual_inputs(shape, dtype, device="meta", **options)
    (x, y, gate, scale, shift), numbers = (
        [given[name] for name in names.split()] for names in ("x y gate scale shift", "eps y_eps centered unit")
    )
    factors = [None if one is None else by_sample(one) for one in (gate, scale, shift)]
    total = x if y is None else torch.empty_like(x)
    normal = residual_norm_triton.forward(None if y is None else total, x, y, *factors, *numbers)
    residual_norm_triton.backward(normal, normal, total, y if numbers[1] else None, *factors[:2], *numbers)


def row(call: str, name: str, kernel: Any) -> dict[str, Any]:
    """What a compiled kernel takes and does. registers: of a thread. shared, stack: bytes of a program, of a thread."""
    text = kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"]
    registers, stack = nvidia_usage(kernel.asm["cubin"]) if "cubin" in kernel.asm else amd_usage(text)
    found = {"call": call, "kernel": name, "registers": registers, "stack": stack, "shared": kernel.metadata.shared}
    return found | {trait: bool(re.search(pattern, text)) for trait, pattern in TRAITS.items()}


TRAITS = {
    "atomics": r"\b(atom|red)\.|_atomic_",
    "tensor_cores": r"\bmma\.sync|\bwgmma\.mma|\bv_mfma_",
    "wide_access": r"\.v4\.|\.v2\.b64|cp\.async[.\w]* \[[^]]*\], \[[^]]*\], (0x10|16)\b|_(load|store)_dwordx4",
    "float64": r"\.f64\b|_f64\b",
}
"""What the assembly of a kernel (PTX, or AMD's) tells by a pattern. wide_access: 16 bytes a thread at once."""


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread, by the cuobjdump that Triton brings."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)


def amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes of scratch memory and 4 for each spilled register) of a thread."""

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    spilled = number("vgpr_spill_count") + number("sgpr_spill_count")
    return number("vgpr_count"), number("private_segment_fixed_size") + 4 * spilled


def main() -> None:
    """Print the rows of the targets that the command line names."""
    compiled = Compiled()
    print(json.dumps({target: compiled.rows(target) for target in sys.argv[1:]}))


if __name__ == "__main__":
    main()
