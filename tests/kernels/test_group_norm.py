"""GroupNorm with SiLU: layouts, sums of many parts, and a mean far from zero."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case
from dbtrain_kernels.dispatch import interpreting
from dbtrain_kernels.group_norm import group_norm, inputs
from tests.kit.operations import on


def cases():
    """Groups of one channel and of three, several parts of the pixels and blocks of the channels, both layouts."""
    calls = {
        "plain": {},
        "channels last": {"shape": (2, 68, 12, 13), "last": True, "shifted": True},
        "a channel a group": {"shape": (1, 4, 3, 3), "silu": False},
        "many parts": {"shape": (1, 4, 18, 128), "groups": 2},
        "bf16": {"shape": (2, 24, 9, 16), "dtype": torch.bfloat16, "shifted": True, "last": True},
    }
    return [Case(name, partial(inputs, **call), call.get("dtype", torch.float32)) for name, call in calls.items()]


@pytest.mark.parametrize("last", [False, True])
def test_the_layout_stays(last):
    """Output and gradient lie in memory as the input does."""
    given = on("cpu", inputs((2, 8, 4, 5), last=last))
    given["x"].requires_grad_()
    y = group_norm(**given)
    (of_x,) = torch.autograd.grad(y.sum(), given["x"])
    for made in (y, of_x):
        assert made.is_contiguous(memory_format=torch.channels_last) == last == (not made.is_contiguous())


def test_a_mean_far_from_zero_costs_no_digits():
    """Sums of squares would lose all of them: 1000^2 is 2^20 variances."""
    given = on("cpu", inputs((1, 8, 16, 16), silu=False))
    given["x"] = 1000 + given["x"]
    want = reference.group_norm(**on("cpu", given, torch.float64))
    assert (group_norm(**given) - want).abs().max() < 1000 * 2**-22


@pytest.mark.skipif(not interpreting(), reason="needs the kernels: see test_interpreter.py")
def test_a_picture_does_not_depend_on_its_neighbours():
    given = on("cpu", inputs((3, 8, 12, 12), last=True))
    whole = group_norm(**given)
    given["x"] = given["x"][1:2] * 1.0
    assert torch.equal(group_norm(**given), whole[1:2])


def test_it_is_what_a_resnet_block_computes():
    norm, x = torch.nn.GroupNorm(2, 6), torch.randn(2, 6, 3, 4)
    torch.nn.init.normal_(norm.weight)
    assert torch.equal(reference.group_norm(x, 2, norm.weight, norm.bias, norm.eps), F.silu(norm(x)))
