"""GEGLU: values far from zero, and what its backward keeps."""

from functools import partial

import torch

from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case
from dbtrain_kernels.geglu import geglu, inputs


def cases():
    """One feature, odd widths, several blocks of one token, bf16."""
    calls = {
        "plain": {},
        "one feature": {"shape": (1, 2)},
        "several blocks": {"shape": (2, 2, 2 * 2051)},
        "bf16": {"shape": (3, 7, 80), "dtype": torch.bfloat16},
    }
    return [Case(name, partial(inputs, **call), call.get("dtype", torch.float32)) for name, call in calls.items()]


def test_far_from_zero_the_gate_is_open_or_shut():
    """And nothing is NaN, where a naive exponential overflows."""
    gate = torch.tensor([-1e4, -30.0, 30.0, 1e4])
    x = torch.cat([torch.full((4,), 3.0), gate]).requires_grad_()
    y = geglu(x)
    (of_x,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, 3 * gate.clamp(min=0)) and torch.equal(of_x, torch.tensor([0, 0, 30, 1e4, 0, 0, 3, 3]))


def test_it_is_diffusers_gate():
    from diffusers.models.activations import GEGLU

    module, hidden = GEGLU(6, 5), torch.randn(2, 3, 6)
    assert torch.equal(reference.geglu(module.proj(hidden)), module(hidden))
