"""Every kernel that training launches, compiled for GPUs that are not here, within its budget.

A kernel that takes too many registers spills them to memory and becomes many times slower, which no test of numbers
sees. So the assembly is looked at: registers, stack, shared memory, tensor cores, 16-byte accesses, atomics.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

import dbtrain_kernels

ROOT = Path(__file__).resolve().parents[2]
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


DOUBLE = {("row_factors", "AdamW, plain"), ("noise_latents", "4 channels, t in strata")}
"""What computes in float64, a few numbers each: a GPU for graphics does that at 1/64 of float32's rate."""


def launched():
    """Names of the kernels of every module of ours, without the functions that they call."""
    parts = {"philox_words", "minus_log_uniform", "cos_sin_turn", "four_normals", "in_element_order"}
    parts |= {"place_in_schedule"}  # what `noise_latents` calls
    parts |= {"columns_of", "outer_block", "add_block"}
    parts |= {"tile_of", "normal_of", "slope_of", "pairs_of", "store_pairs", "angles_of", "weights_of"}
    parts |= {"numbers_of", "inverse_root"}
    places = [name for _, name, _ in iter_modules(dbtrain_kernels.__path__) if name.endswith("_triton")]
    found = [vars(import_module(f"dbtrain_kernels.{place}")) for place in places]
    return {name for held in found for name, kernel in held.items() if isinstance(kernel, JITFunction)} - parts


def faults(row, target):
    """What a compiled kernel does that it must not. Atomics would make the order of sums depend on the run."""
    name, call = row["kernel"], row["call"]
    most = REGISTERS | (FP32_REGISTERS if call.startswith(("solo", "fp32")) else {})
    found = {
        "spills": row["stack"],
        "atomics": row["atomics"],
        "registers": row["registers"] > most[name],
        "shared memory": row["shared"] > SHARED[target],
        "products": row["tensor_cores"] != (name in PRODUCTS),
        "narrow access": name in WIDE and not row["wide_access"],
        "float64": row["float64"] != ((name, call) in DOUBLE),
    }
    return [fault for fault, is_so in found.items() if is_so]


@pytest.mark.slow
@pytest.mark.timeout(900)  # about 85 s of processor time; a busy machine takes its time
def test_every_kernel_keeps_its_budget(tmp_path):
    """One test, since each target's compilation answers all of it, and worker processes would each make their own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kit.compiling", *SHARED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)
    assert rows.keys() == SHARED.keys()
    for target in rows:
        compiled = Counter(row["kernel"] for row in rows[target])
        assert compiled.keys() == launched() == REGISTERS.keys()
        assert [(faults(row, target), row) for row in rows[target] if faults(row, target)] == [], target
        # Both matrices, of rank 16 and 128 in three forms; of tokens that are no multiple of 16 at rank 16 in bf16 and
        # 128 in fp32; and layers that read one input, in four.
        assert compiled["shrink"] == compiled["expand"] == 2 * (3 * 2 + 2 + 4), target
