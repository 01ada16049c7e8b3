"""Which implementation runs, and that loading the package loads nothing; every kernel compiles for a GPU."""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch

from dbtrain_kernels import dispatch
from dbtrain_kernels.dispatch import choose, dtype_problem
from dbtrain_kernels.loss import inputs, loss
from tests.kit.operations import on


def test_a_cpu_runs_plain_pytorch_and_says_so():
    assert choose("loss", "cpu") == (False, "plain PyTorch is the CPU form")


def test_a_gpu_runs_the_kernel_where_triton_loads(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_problem", lambda: None)
    assert choose("loss", "cuda") == (True, "Triton kernel")


def test_a_gpu_falls_back_loudly(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match="loss runs as plain PyTorch, because Triton does not load .*install"):
        assert not choose("loss", "cuda").fused
    monkeypatch.undo()
    problem = dtype_problem((torch.float32,), clean=torch.zeros(1, dtype=torch.float64), noise=None)
    with pytest.warns(UserWarning, match="because clean is float64, not float32"):
        assert choose("loss", "cuda", problem).reason == "clean is float64, not float32"


def test_other_devices_have_no_kernel():
    assert choose("loss", "mps") == (False, "there is no kernel for mps devices")
    assert choose("loss", "meta") == (True, "shapes only")


def test_float64_runs_by_the_specification():
    assert loss(**on("cpu", inputs(), torch.float64)).total.dtype == torch.float64


def loaded_by(code):
    path = os.pathsep.join(path for path in sys.path if path)
    code += "; import sys; print([name for name in ('torch', 'triton', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import dbtrain_kernels") == "[]"


def test_the_operations_load_no_triton():
    modules = "loss, noising, adamw, lora, reference, philox, dispatch, cases"
    assert "triton" not in loaded_by(f"from dbtrain_kernels import {modules}")


SIGNATURES = {
    "loss_triton.loss_elements": (
        "*bf16 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *bf16 *fp32 i32 i32 fp32",
        {"PARAMETERIZATION": "v_prediction", "MASKED": True, "BLOCK": 1024},
    ),
    "loss_triton.loss_sums": ("*fp32 *fp32 *fp32 *fp32 i32 i32 fp32", {"CHUNKS": 16}),
    "noising_triton.noise_latents": (
        "*fp32 *i64 *i64 *i64 *fp32 *fp32 *i64 *i64 *fp32 *fp32 *fp32 i32 i32 i32 fp32 fp32 fp32",
        {"POSTERIOR": 3, "NOISE": 1, "CONSTANT": 4, "TIME": 2, "ROTATION": 9, "OFFSET": True}
        | {"STRATA": 0, "STEPS": 1024, "BLOCK": 256},
    ),
    "adamw_triton.squared_norms": ("*fp32 *fp32 i32", {"BLOCK": 8192}),
    "adamw_triton.row_factors": (
        "*fp32 *fp32 *i64 *fp64 *fp32 *fp32 *u8 *fp32 i32",
        {"LOG_BETA1": math.log(0.9), "LOG_BETA2": math.log(0.999), "FACTORS": 5, "BLOCK": 1024},
    ),
    "adamw_triton.update_rows": (
        "*fp32 *bf16 *fp32 *fp32 *fp32 *bf16 *fp32 i32",
        {
            "BETA2": 0.999,
            "REST1": 0.1,
            "REST2": 0.001,
            "EPS": 1e-8,
            "EMA_REST": 0.001,
            "EMA": True,
            "COMPUTE": True,
            "FACTORS": 5,
            "BLOCK": 1024,
        },
    ),
    "lora_triton.shrink": (
        "*bf16 *fp32 *fp32 *fp32 i32 i32 i32 i64 i32 i32",
        {"PRODUCTS": "bf16", "RANK": 16, "TOKENS": 64, "DEEP": 64},
    ),
    "lora_triton.expand": (
        "*fp32 *fp32 *bf16 *bf16 i32 i32 i32 i64 i32 i32",
        {"PRODUCTS": "bf16", "RANK": 16, "ADD": True, "TOKENS": 64, "WIDE": 64},
    ),
    "lora_triton.add_parts": ("*fp32 *bf16 i32 i32", {"BLOCK": 1024}),
    "lora_triton.outer": (
        "*fp32 *bf16 *fp32 i32 i32 i32 i32 i32",
        {"PRODUCTS": "bf16", "RANK": 16, "SPLIT": 1024, "TOKENS": 64, "WIDE": 64},
    ),
}
COMPILE = """
import importlib, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from tests.kernels.test_dispatch import SIGNATURES
for name, (types, constants) in SIGNATURES.items():
    module, function = name.split(".")
    kernel = getattr(importlib.import_module(f"dbtrain_kernels.{module}"), function)
    types = iter(types.split())
    signature = {arg: "constexpr" if arg in constants else next(types) for arg in kernel.arg_names}
    dtypes = {"bf16": triton.language.bfloat16}
    values = {(kernel.arg_names.index(arg),): dtypes.get(value, value) for arg, value in constants.items()}
    built = compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32))
    print(function, "atom." in built.asm["ptx"], len(built.asm["cubin"]) > 0)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_kernel_compiles_for_a_hopper_gpu_without_atomics(tmp_path):
    """No GPU is needed to compile. Atomics would make the order of sums depend on the run."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, cwd=root, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name.split('.')[1]} False True" for name in SIGNATURES], done.stderr[-2000:]
