"""Every kernel that training launches, compiled for GPUs that are not here, within its budget.

A kernel that takes too many registers spills them to memory and becomes many times slower, which no test of numbers
sees. So the assembly is looked at: registers, stack, shared memory, tensor cores, 16-byte accesses, atomics.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

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

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    adamw_triton, geglu_triton, group_norm_triton, lora_triton, loss_triton, noising_triton, residual_norm_triton,
    rotary_triton,
)  # fmt: skip
REGISTERS = {
    "shrink": 184,
    "expand": 176,
    "outer": 240,
    "add_parts": 40,
    "loss_elements": 48,
    "loss_sums": 48,
    "noise_latents": 160,
    "squared_norms": 48,
    "row_factors": 72,
    "update_rows": 96,
    "gate_forward": 48,
    "gate_backward": 80,
    "channel_moments": 72,
    "group_moments": 48,
    "normalize": 80,
    "channel_slopes": 112,
    "group_slopes": 48,
    "normal_gradient": 128,
    "turn_forward": 48,
    "turn_backward": 64,
    "residual_forward": 64,
    "residual_backward": 96,
}
"""Most registers of a thread. A thread has 255; of 168, a multiprocessor of NVIDIA's holds three programs at once."""
FP32_REGISTERS = {"shrink": 216, "expand": 240, "outer": 216}
"""The same for matrices in fp32, which are rounded in registers, or taken apart where tokens are fp32 too."""
SHARED = {"sm_80": 101_376, "sm_90": 116_224, "gfx942": 65_536}
"""Most bytes of shared memory of a program. sm_80's code runs on sm_86 and sm_89 too, where a program may have 99 KiB;
half of what a multiprocessor of sm_90 has, so that two programs fit; all that gfx942 has."""
PRODUCTS = ("shrink", "expand", "outer")
WIDE = (*PRODUCTS, "add_parts", "loss_elements", "noise_latents", "squared_norms", "update_rows",
        "gate_forward", "gate_backward", "channel_moments", "normalize", "channel_slopes", "normal_gradient",
        "turn_forward", "turn_backward", "residual_forward", "residual_backward")  # fmt: skip
"""Kernels that read or write arrays; the others handle a few numbers of a sample or row."""


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "gfx942"])
def target(request):
    return request.param


@pytest.fixture(scope="module")
def rows(target, tmp_path_factory):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp(target))}
    command = [sys.executable, "-m", "tests.kit.compiling", target]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def names(rows):
    """The rows' calls and kernels, for a failed assertion."""
    return [f"{row['call']}: {row['kernel']}, {row}" for row in rows]


def test_every_kernel_is_compiled(rows):
    kernels = {name: kernel for module in MODULES for name, kernel in vars(module).items()}
    parts = {"philox_words", "minus_log_uniform", "cos_sin_turn", "four_normals", "in_element_order"}
    parts |= {"place_in_schedule"}  # what `noise_latents` calls
    parts |= {"columns_of", "outer_block", "add_block"}
    parts |= {"tile_of", "normal_of", "slope_of", "pairs_of", "store_pairs", "angles_of", "weights_of"}
    parts |= {"numbers_of", "inverse_root"}
    launched = {name for name, kernel in kernels.items() if isinstance(kernel, JITFunction)} - parts
    compiled = Counter(row["kernel"] for row in rows)
    assert compiled.keys() == launched == REGISTERS.keys()
    # Both matrices, of rank 16 and 128 in three forms; of tokens that are no multiple of 16 once in each; and layers
    # that read one input, in four.
    assert compiled["shrink"] == compiled["expand"] == 2 * (3 * 2 + 3 + 4)


def test_none_spills_or_adds_by_atomics(rows):
    """Atomics would make the order of sums depend on the run."""
    assert names(row for row in rows if row["stack"] or row["atomics"]) == []


def test_registers_and_shared_memory_keep_their_budget(rows, target):
    def registers(row):
        fp32 = row["call"].startswith(("solo", "fp32"))
        return (FP32_REGISTERS if fp32 else REGISTERS).get(row["kernel"], REGISTERS[row["kernel"]])

    assert names(row for row in rows if row["registers"] > registers(row) or row["shared"] > SHARED[target]) == []


def test_products_are_made_by_tensor_cores(rows):
    assert names(row for row in rows if row["tensor_cores"] != (row["kernel"] in PRODUCTS)) == []


def test_arrays_are_read_16_bytes_at_a_time(rows):
    assert names(row for row in rows if row["kernel"] in WIDE and not row["wide_access"]) == []


def test_float64_is_left_to_a_few_numbers(rows):
    """A GPU for graphics computes float64 at 1/64 of float32's rate."""
    wide = {(row["kernel"], row["call"]) for row in rows if row["float64"]}
    assert wide == {("row_factors", "AdamW, plain"), ("noise_latents", "4 channels, t in strata")}
