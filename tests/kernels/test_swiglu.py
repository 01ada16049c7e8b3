"""SwiGLU: tensors of their own and parts of one projection."""

from functools import partial

import torch

from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case
from dbtrain_kernels.swiglu import inputs, swiglu
from tests.kit.operations import on


def cases():
    """One feature, several blocks of one token, parts of a projection, bf16."""
    calls = {
        "plain": {},
        "one feature": {"shape": (1, 1)},
        "several blocks": {"shape": (2, 2, 2051), "parts": True},
        "bf16": {"shape": (3, 7, 40), "dtype": torch.bfloat16},
    }
    return [Case(name, partial(inputs, **call), call.get("dtype", torch.float32)) for name, call in calls.items()]


def test_far_from_zero_the_gate_is_open_or_shut():
    """And nothing is NaN, where a naive exponential overflows."""
    gate, value = torch.tensor([[-1e4, -200.0, 200.0, 1e4]], requires_grad=True), torch.full((1, 4), 3.0)
    y = swiglu(gate, value)
    (of_gate,) = torch.autograd.grad(y.sum(), gate)
    assert torch.equal(y, 3 * gate.clamp(min=0)) and torch.equal(of_gate, torch.tensor([[0.0, 0, 3, 3]]))


def test_the_reference_is_the_gate_of_diffusers():
    from diffusers.models.transformers.transformer_flux2 import Flux2SwiGLU

    x = torch.randn(2, 3, 8)
    assert torch.equal(reference.swiglu(*x.chunk(2, -1)), Flux2SwiGLU()(x))


def test_parts_of_a_projection_are_read_where_they_lie():
    """Up to 8 units in the last place: PyTorch computes the exponential otherwise where numbers lie side by side."""
    close = partial(torch.testing.assert_close, rtol=2.0**-20, atol=0)
    wide = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0))
    parts = wide[..., 3:11], wide[..., 11:19]
    close(swiglu(*parts), swiglu(*(part.contiguous() for part in parts)))
    strided = on("cpu", inputs((2, 3, 8)))
    close(swiglu(**{name: one.mT.contiguous().mT for name, one in strided.items()}), swiglu(**strided))
