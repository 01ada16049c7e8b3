"""Layers that read one input as one operation: where the gradients go, and what is not computed."""

from functools import partial

import pytest
import torch

from dbtrain.bench.operators import Operators
from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case
from dbtrain_kernels.lora import SPLIT
from dbtrain_kernels.lora_group import inputs, lora_group
from tests.kit.operations import on


def cases():
    """One layer, layers of one width and of several, tiles that are crossed, many blocks of columns, parts, bf16."""
    calls = {
        "plain": {},
        "one layer": {"widths": (5,), "bias": True},
        "many layers": {"subjects": 1, "samples": 1, "tokens": 5, "wide": 20, "widths": (16, 32) * 9, "rank": 16},
        "several parts": {"samples": 1, "tokens": SPLIT + 65, "wide": 5, "widths": (3, 35), "rank": 2, "bias": True},
        "bf16": {"tokens": 33, "wide": 40, "widths": (48, 80), "rank": 4, "dtype": torch.bfloat16,
                 "matrices": torch.bfloat16},
    }  # fmt: skip
    return [Case(name, partial(inputs, **call), call.get("dtype", torch.float32)) for name, call in calls.items()]


def gradients(function, given, **more):
    """Output, and gradients of x and of both matrices for a fixed cotangent."""
    names = [name for name in ("x", "down_NGD", "up_NOR") if name != more.get("without")]
    for name in names:
        given[name].requires_grad_()
    output = function(**given, **({"into": more["into"]} if "into" in more else {}))
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    grads = torch.autograd.grad(output, [given[name] for name in names], cotangent, allow_unused=True)
    return {"output": output.detach(), **dict(zip(names, grads))}


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_it_is_its_layers_in_float64(case):
    got, want = (
        gradients(function, on("cpu", case.inputs(), torch.float64)) for function in (lora_group, reference.lora_group)
    )
    assert all((got[name] - want[name]).norm() < 1e-12 * want[name].norm() for name in want)


@pytest.mark.parametrize("case", cases()[:4], ids=lambda case: case.name)
def test_gradients_are_added_into_an_arena(case):
    """Rows of an arena lie far apart, and what lies between them stays."""
    want = gradients(lora_group, on("cpu", case.inputs()))
    given, into, arenas = on("cpu", case.inputs()), [], []
    for name in ("down_NGD", "up_NOR"):
        matrices = given[name]
        arena = torch.full((len(matrices), matrices[0].numel() + 5), 2.0)
        arenas.append(arena)
        into.append(arena[:, 3:-2].view(matrices.shape))
    got = gradients(lora_group, given, into=tuple(into))
    assert torch.equal(got["output"], want["output"]) and torch.equal(got["x"], want["x"])
    assert got["down_NGD"] is None and got["up_NOR"] is None
    for name, place, arena in zip(("down_NGD", "up_NOR"), into, arenas):
        assert torch.allclose(place, want[name] + 2, rtol=1e-6, atol=1e-6), name
        assert (arena[:, :3] == 2).all() and (arena[:, -2:] == 2).all()


def test_captions_that_are_encoded_once_cost_no_gradient():
    """Neither the frozen product's nor the adapters'."""
    results, counts = [], []
    for without in ("nothing", "x"):
        with Operators() as counted:
            results.append(gradients(lora_group, on("cpu", cases()[0].inputs()), without=without))
        counts.append((counted.fused, counted.names["mm"] + counted.names["bmm"] + counted.names["baddbmm_"]))
    assert all(torch.equal(results[0][name], results[1][name]) for name in ("output", "down_NGD", "up_NOR"))
    (fused, products), (less_fused, fewer_products) = counts
    assert fused - less_fused == (1 if fused else 0) and fewer_products < products


def test_a_nan_stays_with_its_adapter():
    clean, dirty = on("cpu", cases()[0].inputs()), on("cpu", cases()[0].inputs())
    dirty["x"][0] = torch.nan
    got, want = gradients(lora_group, dirty), gradients(lora_group, clean)
    for name, half in (("output", 2), ("x", 2), ("down_NGD", 1), ("up_NOR", 1)):
        assert torch.equal(got[name][half:], want[name][half:]), name
