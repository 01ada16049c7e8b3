"""The stacked LoRA update against one adapter at a time, and how many operators it costs."""

from functools import partial

import pytest
import torch

from dbtrain.bench.operators import Operators
from dbtrain_kernels import lora as module
from dbtrain_kernels.cases import Case
from dbtrain_kernels.dispatch import Choice
from dbtrain_kernels.lora import MAX_RANK, SPLIT, by_row, inputs, lora
from tests.kit.operations import on

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def cases():
    """One of everything, one and several adapters, tiles that are crossed and met, parts of the token sum, bf16."""
    calls = {
        "plain": {},
        "one of everything": {"subjects": 1, "samples": 1, "tokens": 1, "wide": 1, "out": 1, "rank": 1},
        "several tiles": {"subjects": 3, "samples": 1, "tokens": 67, "wide": 70, "out": 67, "rank": 5},
        "exact tiles": {"subjects": 2, "samples": 1, "tokens": 64, "wide": 64, "out": 64, "rank": 16},
        "a high rank": {"subjects": 1, "rank": 33},
        "a rank in two parts": {"subjects": 1, "samples": 1, "rank": 70},
        "several parts": {"subjects": 2, "samples": 1, "tokens": SPLIT + 65, "wide": 5, "out": 3, "rank": 2},
        "bf16 copies": {"samples": 1, "tokens": SPLIT + 3, "dtype": torch.bfloat16, "matrices": torch.bfloat16},
        "bf16": {"subjects": 2, "tokens": 33, "wide": 40, "out": 66, "rank": 4, "dtype": torch.bfloat16},
    }
    return [Case(name, partial(inputs, **call), call.get("dtype", torch.float32)) for name, call in calls.items()]


def results(arguments):
    """Output, and gradients for a fixed cotangent."""
    names = ("x", "base", "down_NRD", "up_NDR")
    for name in names:
        arguments[name].requires_grad_()
    output = lora(**arguments)
    cotangent = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
    gradients = torch.autograd.grad(output, [arguments[name] for name in names], cotangent)
    return {"output": output.detach(), "cotangent": cotangent, **dict(zip(names, gradients))}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", cases()[:4], ids=lambda case: case.name)
def test_each_adapter_sees_only_its_segment(case, device):
    whole = results(on(device, case.inputs()))
    subjects = len(case.inputs()["scale_N"])
    share = len(case.inputs()["x"]) // subjects
    for n in range(subjects):
        one = on(device, case.inputs())
        cut = {name: one[name][n : n + 1].clone() for name in ("down_NRD", "up_NDR", "scale_N")}
        cut |= {name: one[name][n * share : (n + 1) * share].clone() for name in ("x", "base")}
        x, down, up = cut["x"].double(), cut["down_NRD"][0].double(), cut["up_NDR"][0].double()
        want = cut["base"].double() + cut["scale_N"].double() * (x @ down.T) @ up.T
        got = whole["output"][n * share : (n + 1) * share]
        assert (got.double() - want).norm() < 1e-6 * want.norm()
        cotangent = whole["cotangent"][n * share : (n + 1) * share].double().reshape(-1, up.shape[0])
        tokens, scale = x.reshape(-1, down.shape[1]), cut["scale_N"].double()
        wanted = {"up_NDR": scale * cotangent.T @ (tokens @ down.T), "down_NRD": scale * (cotangent @ up).T @ tokens}
        for name, gradient in wanted.items():
            assert (whole[name][n].double() - gradient).norm() < 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_with_its_adapter(device):
    arguments = on(device, cases()[2].inputs())
    clean = results(on(device, cases()[2].inputs()))
    arguments["x"].data[0] = torch.nan
    got = results(arguments)
    for name in ("output", "x"):
        assert torch.equal(got[name][1:], clean[name][1:])
    for name in ("down_NRD", "up_NDR"):
        assert torch.equal(got[name][1:], clean[name][1:])


def test_an_input_of_another_dtype_is_taken_in_the_outputs():
    """As under autocast, where a norm's output is fp32 and the frozen layer's is bf16."""
    arguments = on("cpu", cases()[-1].inputs())
    arguments["x"] = arguments["x"].float()
    with torch.autocast("cpu", torch.bfloat16):
        assert lora(**arguments).dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [cases()[0], cases()[6], cases()[-1]], ids=lambda case: case.name)
def test_matrices_that_are_views_of_an_arena_are_read_where_they_are(case, device):
    """Rows of a pack's arena lie far apart."""
    plain, views = on(device, case.inputs()), on(device, case.inputs())
    for name in ("down_NRD", "up_NDR"):
        matrices = views[name]
        arena = torch.full((len(matrices), matrices[0].numel() + 5), torch.nan, dtype=matrices.dtype, device=device)
        views[name] = arena[:, 3:-2].view(matrices.shape).copy_(matrices).detach()
        assert len(matrices) == 1 or not views[name].is_contiguous()
        assert by_row(views[name]) is views[name]
    got, want = results(views), results(plain)
    assert {name: torch.equal(got[name], want[name]) for name in want} == dict.fromkeys(want, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [cases()[0], cases()[6]], ids=lambda case: case.name)
def test_captions_that_are_encoded_once_cost_no_gradient(case, device):
    """The matrices' gradients are the same bits; where the kernels run, one launch is saved."""
    gradients, launches = [], []
    for tracked in (True, False):
        arguments = on(device, case.inputs())
        names = ["base", "down_NRD", "up_NDR", *(["x"] if tracked else [])]
        for name in names:
            arguments[name].requires_grad_()
        with Operators() as counted:
            output = lora(**arguments)
            gradients.append(torch.autograd.grad(output, [arguments[name] for name in names], torch.ones_like(output)))
        launches.append(counted.fused)
    assert all(torch.equal(one, other) for one, other in zip(*gradients))
    assert launches[0] - launches[1] == (1 if launches[0] else 0)


@pytest.mark.parametrize("rank, fused", [(MAX_RANK, True), (MAX_RANK + 1, False)])
def test_a_rank_that_is_too_high_goes_the_plain_way(rank, fused, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "choose", lambda name, device, problem: asked.append(problem) or Choice(False, ""))
    lora(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1, rank, 2), torch.zeros(1, 3, rank), torch.ones(1))
    assert asked == [None if fused else f"the rank is {rank}, over {MAX_RANK}"]
