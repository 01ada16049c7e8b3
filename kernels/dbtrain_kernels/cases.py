"""Contract-test inputs of every operation: odd shapes, every option, and the error bound of each dtype."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbtrain_kernels.reference import TARGETS

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7 + 2.0**-8}
"""Relative error |got - want| / |want| (2-norms) that an output of a dtype may have against float64.

float32: each element takes fewer than 16 roundings of 2^-24, and sums are trees. bfloat16, 8 significant bits: the
kernel rounds its float32 gradient (2^-8; Triton's interpreter truncates: 2^-7), and backward rounds once more (2^-8).
"""

PRODUCT_BOUNDS = {torch.float32: 0.0, torch.bfloat16: 5 * 2.0**-7}
"""The same for any result of products whose operands are rounded to a dtype on the way: at most two matrices, a small
factor and the output or the cotangent, each by 2^-8 (truncated, in the interpreter: 2^-7)."""


@dataclass(frozen=True)
class Case:
    """One call: keyword arguments of an operation, made by `inputs()` anew each time.

    products: the dtype in which matrix products take their operands, which bounds float32 results too.
    """

    name: str
    inputs: Callable[[], dict[str, Any]]
    products: torch.dtype = torch.float32


def _loss_inputs(
    shape: tuple[int, ...] = (3, 4, 5, 7),
    parameterization: str = "epsilon",
    dtype: torch.dtype = torch.float32,
    subjects: int | None = None,
    masked: bool = False,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    prediction, clean, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    angle_B = torch.rand(shape[0], generator=generator) * 1.5
    inputs = {
        "prediction": prediction.to(dtype),
        "clean": clean,
        "noise": noise,
        "alpha_B": angle_B.cos(),
        "sigma_B": angle_B.sin(),
        "weight_B": torch.rand(shape[0], generator=generator) + 0.1,
        "parameterization": parameterization,
    }
    if subjects is not None:
        # Unordered, and the first subject has no sample.
        subject_B = torch.arange(shape[0]).flip(0) % (subjects - 1) + 1
        inputs |= {"subject_B": subject_B, "subjects": subjects}
    if masked:
        inputs["mask"] = torch.rand((shape[0], 1, *shape[2:]), generator=generator)
    return inputs


def loss() -> list[Case]:
    """Each parameterization, one element, several blocks, an exact block, bf16, subjects, masks, and all at once."""
    calls: dict[str, dict[str, Any]] = {name: {"parameterization": name} for name in TARGETS}
    calls |= {
        "one element": {"shape": (1, 1, 1, 1)},
        "several blocks": {"shape": (2, 4, 33, 35), "parameterization": "v_prediction"},
        "an exact block": {"shape": (2, 4, 16, 16), "parameterization": "flow"},
        "bf16": {"dtype": torch.bfloat16, "parameterization": "v_prediction"},
        "subjects": {"shape": (5, 3, 3, 5), "subjects": 3},
        "one subject by index": {"shape": (5, 3, 3, 5), "subjects": 2},
        "mask": {"masked": True, "parameterization": "flow"},
        "all options": {
            "shape": (7, 4, 9, 31),
            "dtype": torch.bfloat16,
            "subjects": 4,
            "masked": True,
            "parameterization": "v_prediction",
        },
    }
    return [Case(name, partial(_loss_inputs, **call)) for name, call in calls.items()]


def _noising_inputs(
    shape: tuple[int, ...] = (3, 4, 5, 7), rows: int | None = None, drawn: int = 0, **options: float
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    samples, channels, *sides = shape
    steps = drawn or samples
    angle_S = torch.rand(steps, generator=generator) * 1.5
    inputs: dict[str, Any] = {
        "moments": torch.randn((rows or samples, 2 * channels, *sides), generator=generator),
        "key_B2": torch.randint(0, 2**32, (samples, 2), generator=generator),
        "slot_B": torch.randint(0, 2**31, (samples,), generator=generator),
        "step_B": torch.randint(0, 2**31, (samples,), generator=generator),
        "alpha_S": angle_S.cos(),
        "sigma_S": angle_S.sin(),
        "purposes": (3, 1, 4, 2, 9),
        **options,
    }
    if rows is not None:
        inputs["row_B"] = torch.randint(0, rows, (samples,), generator=generator)
    if not drawn:
        inputs["index_B"] = torch.arange(samples)
    elif "strata" not in options:
        inputs["first_S"] = torch.randint(0, 2**32, (steps,), generator=generator).sort().values
        inputs["first_S"][0] = 0
    return inputs


def noising() -> list[Case]:
    """Elements that are no multiple of four, several blocks, bank rows, t given and drawn, and each scalar option."""
    calls: dict[str, dict[str, Any]] = {
        "plain": {},
        "one element": {"shape": (1, 1, 1, 1)},
        "several blocks": {"shape": (2, 4, 19, 29)},
        "bank rows": {"rows": 11},
        "scale and shift": {"scale": 0.18215, "shift": 0.0609},
        "noise offset": {"shape": (2, 5, 3, 3), "noise_offset": 0.1},
        "t drawn": {"shape": (9, 1, 3, 3), "drawn": 1000},
        "t drawn from few": {"shape": (9, 4, 17, 19), "drawn": 3},
        "t in strata": {"shape": (8, 1, 3, 5), "drawn": 1000, "strata": 4},
        "all options": {
            "shape": (4, 6, 9, 5), "rows": 2, "scale": 1.5, "shift": -0.3, "noise_offset": 0.05,
            "drawn": 77, "strata": 3,
        },
    }  # fmt: skip
    return [Case(name, partial(_noising_inputs, **call)) for name, call in calls.items()]


def _adamw_inputs(
    rows: int = 3, elements: int = 1037, ema: bool = False, compute: bool = False, rounding: bool = False,
    low: tuple[str, ...] = (), **options: Any,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    settings = torch.rand((3, rows), generator=generator)
    inputs = {
        "master": torch.randn((rows, elements), generator=generator),
        "grad": torch.randn((rows, elements), generator=generator),
        "exp_avg": torch.randn((rows, elements), generator=generator) * 0.1,
        "exp_avg_sq": torch.rand((rows, elements), generator=generator) * 0.01,
        "step_N": torch.arange(rows) * 7,
        "lr_N": settings[0] + 0.1,
        "clip_N": settings[1] * elements**0.5 * 2,  # clips about half of the rows
        "decay_N": settings[2],
        "active_N": torch.ones(rows, dtype=torch.bool),
    }
    if ema:
        inputs |= {"ema": torch.randn((rows, elements), generator=generator), "ema_decay": 0.99}
    if compute:
        inputs["compute"] = inputs["master"].bfloat16()
    if rounding:
        inputs["rounding_N2"] = torch.randint(0, 2**32, (rows, 2), generator=generator)
    inputs |= {name: inputs[name].bfloat16() for name in low}
    return inputs | options


def adamw() -> list[Case]:
    """One element, several blocks and norm chunks, rows that rest, clipping off, fp64 settings, EMA, other betas."""
    calls: dict[str, dict[str, Any]] = {
        "plain": {},
        "one element": {"rows": 1, "elements": 1},
        "several norm chunks": {"rows": 2, "elements": 8192 + 1031},
        "a resting row": {"active_N": torch.tensor([True, False, True])},
        "no clipping": {"clip_N": torch.full((3,), torch.inf)},
        "float64 settings": {"lr_N": torch.tensor([1e-3, 1e-5, 0.0], dtype=torch.float64)},
        "late steps": {"step_N": torch.tensor([10, 1000, 100000])},
        "ema": {"ema": True},
        "flat": {"rows": 1, "elements": 4099, "compute": True, "low": ("grad",)},
        "flat, rounded at random": {"rows": 1, "compute": True, "rounding": True, "ema": True},
        "bf16 masters": {"compute": True, "rounding": True, "low": ("master", "grad")},
        "other constants": {"beta1": 0.5, "beta2": 0.99, "eps": 1e-3},
        "no momentum": {"beta1": 0.0, "beta2": 0.0},
    }
    return [Case(name, partial(_adamw_inputs, **call)) for name, call in calls.items()]


def _lora_inputs(
    subjects: int = 2, samples: int = 2, tokens: int = 7, wide: int = 9, out: int = 11, rank: int = 3,
    dtype: torch.dtype = torch.float32, matrices: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    lead = (subjects * samples, tokens)
    return {
        "x": torch.randn((*lead, wide), generator=generator).to(dtype),
        "base": torch.randn((*lead, out), generator=generator).to(dtype),
        "down_NRD": (torch.randn((subjects, rank, wide), generator=generator) * wide**-0.5).to(matrices),
        "up_NDR": torch.randn((subjects, out, rank), generator=generator).to(matrices),
        "scale_N": torch.rand(subjects, generator=generator) + 0.5,
    }


def lora() -> list[Case]:
    """One of everything, one and several adapters, tiles that are crossed and met, parts of the token sum, bf16."""
    calls: dict[str, dict[str, Any]] = {
        "plain": {},
        "one of everything": {"subjects": 1, "samples": 1, "tokens": 1, "wide": 1, "out": 1, "rank": 1},
        "several tiles": {"subjects": 3, "samples": 1, "tokens": 67, "wide": 70, "out": 131, "rank": 5},
        "exact tiles": {"subjects": 2, "samples": 1, "tokens": 64, "wide": 64, "out": 64, "rank": 16},
        "a high rank": {"subjects": 1, "rank": 33},
        "several parts": {"subjects": 2, "samples": 1, "tokens": 1024 + 65, "wide": 5, "out": 3, "rank": 2},
        "bf16 copies": {"samples": 1, "tokens": 1024 + 3, "dtype": torch.bfloat16, "matrices": torch.bfloat16},
        "bf16": {"subjects": 2, "tokens": 65, "wide": 40, "out": 66, "rank": 4, "dtype": torch.bfloat16},
    }
    return [Case(name, partial(_lora_inputs, **call), call.get("dtype", torch.float32)) for name, call in calls.items()]


def on(device: str, inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Copies of the inputs on a device, floating tensors in `dtype` where it is given."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None, copy=True)

    return {name: moved(value) for name, value in inputs.items()}
