"""Which implementation runs, and that loading the package loads nothing."""

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
