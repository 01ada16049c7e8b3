"""What `dbtrain bench` says a fused operation starts, against what it starts: kernels, and copies of its arguments."""

import pytest
import torch

from dbtrain.bench.operators import Operators
from dbtrain_kernels import OPS
from dbtrain_kernels.dispatch import interpreting
from tests.kit.operations import on

KernelInterface = pytest.importorskip("triton.runtime.jit").KernelInterface
pytestmark = pytest.mark.skipif(not interpreting(), reason="needs the kernels: see test_interpreter.py")


@pytest.fixture
def started(monkeypatch):
    """Grids of the kernels that were started: Triton (3.7) takes each start as `kernel[grid]`. None of them runs, since
    the interpreter takes its time and what they would compute decides no start."""
    grids = []

    def start(kernel, grid):
        grids.append(grid)
        return lambda *arguments, **options: None

    monkeypatch.setattr(KernelInterface, "__getitem__", start)
    return grids


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


@pytest.mark.parametrize("name", [name for name in OPS if OPS[name].launches])
@pytest.mark.parametrize("made", [lambda inputs: inputs, strided], ids=["plain", "strided"])
def test_the_table_of_launches_tells_what_is_started(name, made, started):
    for case in OPS[name].load("cases")():
        inputs = made(on("cpu", case.inputs()))
        for key in OPS[name].differentiable:
            if inputs[key] is not None:
                inputs[key].requires_grad_()
        started.clear()
        with Operators() as counted:
            output = OPS[name].load("fused")(**inputs)
            heads = [one for one in (output if isinstance(output, tuple) else (output,)) if one.requires_grad]
            if heads:
                heads[0].backward(torch.ones_like(heads[0]).expand_as(heads[0]))
        assert counted.fused == len(started) > 0, case.name


def test_copies_of_arguments_are_counted_beside_the_kernels(started):
    """Arguments of another layout or dtype are copied before the operator, where everybody sees it."""
    case = OPS["noising"].load("cases")()[0]
    counts = []
    for inputs in (on("cpu", case.inputs()), strided(on("cpu", case.inputs()))):
        with Operators() as counted:
            OPS["noising"].load("fused")(**inputs)
        counts.append(counted.launches)
    assert counts == [1, 4]  # the kernel, then also the moments and both tables
