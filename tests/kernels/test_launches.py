"""What `dbtrain bench` says a fused operation starts, against what it starts: kernels, and copies of its arguments."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbtrain.bench.operators import Operators
from dbtrain_kernels import OPS
from dbtrain_kernels.cases import on
from dbtrain_kernels.dispatch import interpreting
from tests.kernels.test_dispatch import SIGNATURES

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs the kernels: see test_interpreter.py")


class Given(TorchDispatchMode):
    """Remembers where the arguments of fused operations lie."""

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dbtrain":
            self.places |= {value.data_ptr() for value in args if isinstance(value, torch.Tensor)}
        return func(*args, **(kwargs or {}))


class Counted:
    """A kernel that counts how often it is started."""

    def __init__(self, kernel, started):
        self.kernel, self.started = kernel, started

    def __getitem__(self, grid):
        self.started.append(grid)
        return self.kernel[grid]


@pytest.fixture
def started(monkeypatch):
    """Grids of the kernels that were started."""
    grids = []
    for name in SIGNATURES:
        module = importlib.import_module(f"dbtrain_kernels.{name.split('.')[0]}")
        monkeypatch.setattr(module, name.split(".")[1], Counted(getattr(module, name.split(".")[1]), grids))
    return grids


@pytest.fixture
def copied(monkeypatch):
    """(what remembers the arguments, those that reached the kernels from elsewhere: they were copied)."""
    given, copies = Given(), []

    def looked_at(function):
        def inner(*args):
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            copies.extend(value for value in tensors if value.data_ptr() not in given.places)
            return function(*args)

        return inner

    for name in ("loss.launch", "noising.launch", "adamw.launch", "lora.forward", "lora.backward"):
        module = importlib.import_module(f"dbtrain_kernels.{name.split('.')[0]}_triton")
        monkeypatch.setattr(module, name.split(".")[1], looked_at(getattr(module, name.split(".")[1])))
    return given, copies


def strided(inputs):
    """The same, but float64 tables, matrices in arenas, and images whose channels come last."""
    changed = dict(inputs)
    for name, value in inputs.items():
        if name in ("alpha_S", "sigma_S", "alpha_B", "sigma_B"):
            changed[name] = value.double()
        elif name in ("prediction", "moments"):
            changed[name] = value.to(memory_format=torch.channels_last)
        elif name in ("x", "base"):
            changed[name] = value.mT.contiguous().mT
        elif name in ("down_NRD", "up_NDR"):
            arena = torch.zeros(len(value), value[0].numel() + 3)
            changed[name] = arena[:, :-3].view(value.shape).copy_(value)
    return changed


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("made", [lambda inputs: inputs, strided], ids=["plain", "strided"])
def test_the_table_of_launches_tells_what_is_started(name, made, started, copied):
    given, copies = copied
    for case in OPS[name].load("cases")():
        inputs = made(on("cpu", case.inputs()))
        for key in OPS[name].differentiable:
            inputs[key].requires_grad_()
        started.clear(), copies.clear(), given.places.clear()
        with Operators() as counted, given:
            output = OPS[name].load("fused")(**inputs)
            heads = [one for one in (output if isinstance(output, tuple) else (output,)) if one.requires_grad]
            if heads:
                heads[0].backward(torch.ones_like(heads[0]).expand_as(heads[0]))
        assert counted.fused == len(started) + len(copies), (case.name, len(started), len(copies))
