"""A residual addition with the norm after it: every form of a block, views, and parameters that train."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case
from dbtrain_kernels.residual_norm import by_sample, inputs, of_samples, residual_norm
from tests.kit.operations import on


def cases():
    """The norm alone and after an addition, with a gate and a norm of what is added, by mean square, and in bf16."""
    calls = {
        "plain": {},
        "norm alone": {"shape": (2, 3, 33), "added": False},
        "modulated": {"shape": (3, 4, 24), "modulated": True},
        "mean square": {"shape": (5, 12), "centered": False},
        "a wide row": {"shape": (1, 2, 1030), "modulated": True, "added": False},
        "bf16": {"shape": (2, 5, 40), "dtype": torch.bfloat16},
        "all": {"shape": (2, 3, 48), "modulated": True, "centered": False, "normed": True},
    }
    return [Case(name, partial(inputs, **call), call.get("dtype", torch.float32)) for name, call in calls.items()]


def test_the_reference_is_the_norm_and_modulation_of_diffusers():
    """The blocks of a U-Net, of FLUX.1 and of Z-Image, as diffusers writes them."""
    x, y, weight, bias = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(8), torch.randn(8)
    scale, shift, gate = torch.randn(2, 24).chunk(3, 1)
    total, normal = reference.residual_norm(x, weight, bias, y, eps=1e-5)
    assert torch.equal(total, y + x) and torch.allclose(normal, F.layer_norm(y + x, (8,), weight, bias), atol=1e-5)
    told = {"scale": scale[:, None], "shift": shift[:, None], "gate": gate[:, None]}
    total, normal = reference.residual_norm(x, y=y, unit=True, **told)
    assert torch.equal(total, x + gate.unsqueeze(1) * y)
    assert torch.equal(normal, F.layer_norm(total, (8,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
    factors = weight * told["scale"], None, y, weight * gate[:, None]
    total, normal = reference.residual_norm(x, *factors, 1e-6, 1e-5, False)
    assert torch.allclose(total, x + gate[:, None] * F.rms_norm(y, (8,), weight, 1e-5), atol=1e-5)
    assert torch.allclose(normal, F.rms_norm(total, (8,), weight, 1e-6) * told["scale"], atol=1e-5)


def test_the_total_without_an_addition_is_x_itself():
    """No copy, and both gradients reach x."""
    given = on("cpu", inputs((2, 3, 16), added=False))
    x = given.pop("x").requires_grad_()
    total, normal = residual_norm(x, **given)
    assert total.data_ptr() == x.data_ptr()
    (got,) = torch.autograd.grad((total * 3).sum() + normal.square().sum(), x)
    (of_normal,) = torch.autograd.grad(residual_norm(x, **given).normal.square().sum(), x)
    assert torch.allclose(got, 3 + of_normal, atol=1e-5)


@pytest.mark.parametrize("trained", ["scale", "shift", "gate"])
def test_factors_that_train_have_gradients(trained):
    """The kernel has none for them."""
    found = []
    for dtype, function in ((torch.float64, reference.residual_norm), (torch.float32, residual_norm)):
        given = on("cpu", inputs((2, 3, 8), modulated=True), dtype)
        given[trained].requires_grad_()
        found += torch.autograd.grad(sum(one.square().sum() for one in function(**given)), given[trained])
    assert torch.allclose(found[1].double(), found[0], rtol=1e-4)


def test_factors_of_tokens_are_not_taken_for_those_of_samples():
    """Though there are as many of them."""
    given = on("cpu", inputs((3, 3, 8), modulated=True)) | {"scale": torch.randn(1, 3, 8)}
    assert not of_samples(given["scale"], given["x"])
    assert all(map(torch.equal, residual_norm(**given), reference.residual_norm(**given)))


def test_views_of_a_projection_are_read_where_they_lie():
    projection = torch.randn(2, 48)
    part = projection.chunk(6, 1)[2]
    assert by_sample(part[:, None]).data_ptr() == part.data_ptr() and by_sample(part).stride() == (48, 1)
    given = on("cpu", inputs((2, 3, 8), modulated=True))
    other = {**given, "x": given["x"].mT.contiguous().mT, "scale": given["scale"].clone()}
    assert all(map(torch.equal, residual_norm(**given), residual_norm(**other)))
