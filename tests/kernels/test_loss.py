"""The fused loss against the equation written out, with the objective's own weights; samples of many subjects."""

from functools import partial

import pytest
import torch

from dbtrain.objective.noise import discrete_schedule, flow_schedule
from dbtrain.objective.weighting import weight_table
from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case
from dbtrain_kernels.loss import inputs, loss
from dbtrain_kernels.reference import TARGETS
from tests.kit.operations import on

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GAMMA, LAMBDA, BATCH = 5.0, 0.7, 3
ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
INDEX = [5, 120, 700, 20, 400, 990]  # by turns above and below SNR 5, in both roles


def cases():
    """Each parameterization, one element, several blocks, an exact block, bf16, a mask, and all at once."""
    calls = {name: {"parameterization": name} for name in TARGETS}
    low = {"dtype": torch.bfloat16, "parameterization": "v_prediction"}
    calls |= {
        "one element": {"shape": (1, 1, 1, 1)},
        "several blocks": {"shape": (2, 4, 33, 35), "parameterization": "v_prediction"},
        "an exact block": {"shape": (2, 4, 16, 16), "parameterization": "flow"},
        "bf16": low,
        "mask": {"masked": True, "parameterization": "flow"},
        "all options": {"shape": (7, 4, 9, 31), "masked": True, **low},
    }
    return [Case(name, partial(inputs, **call)) for name, call in calls.items()]


def schedule_of(parameterization):
    return flow_schedule() if parameterization == "flow" else discrete_schedule(ALPHA_BAR, parameterization)


def training_inputs(parameterization):
    """Three instance and three prior samples under Min-SNR, with W as the training step makes it."""
    generator = torch.Generator().manual_seed(5)
    prediction, clean, noise = (torch.randn((2 * BATCH, 4, 3, 5), generator=generator) for _ in range(3))
    schedule, index_B = schedule_of(parameterization), torch.tensor(INDEX)
    role_B = torch.tensor([1.0] * BATCH + [LAMBDA] * BATCH, dtype=torch.float64)
    return {
        "prediction": prediction,
        "clean": clean,
        "noise": noise,
        "alpha_B": schedule.alpha_S[index_B],
        "sigma_B": schedule.sigma_S[index_B],
        "weight_B": role_B / BATCH * weight_table("min_snr", schedule, GAMMA)[index_B],
        "parameterization": parameterization,
    }


def equation(inputs, mutant=None):
    """L in float64, number by number: share * role * min(SNR, gamma) / |x0 error factor| * mean|f - y|^2."""
    total = 0.0
    for b in range(2 * BATCH):
        f, x, eps = (inputs[name][b].double() for name in ("prediction", "clean", "noise"))
        a, s = float(inputs["alpha_B"][b]), float(inputs["sigma_B"][b])
        name = inputs["parameterization"]
        name = {"v for eps": "v_prediction"}.get(mutant, name)
        y = {"epsilon": eps, "v_prediction": a * eps - s * x, "sample": x, "flow": eps - x}[name]
        snr = (a / s) ** 2
        clipped = snr if mutant == "no Min-SNR clamp" else min(snr, GAMMA)
        factor = {"epsilon": 1 / snr, "v_prediction": 1 / (snr + 1), "sample": 1.0, "flow": s * s}
        role = LAMBDA if (b >= BATCH) != (mutant == "wrong role") else 1.0
        share = 1 / (2 * BATCH if mutant == "mean for sum" else BATCH)
        total += share * role * clipped * factor[inputs["parameterization"]] * ((f - y) ** 2).mean().item()
    return total


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parameterization", TARGETS)
def test_the_training_equation(parameterization, device):
    inputs = training_inputs(parameterization)
    assert loss(**on(device, inputs)).total.item() == pytest.approx(equation(inputs), rel=1e-6)


@pytest.mark.parametrize("mutant", ["v for eps", "no Min-SNR clamp", "wrong role", "mean for sum"])
def test_wrong_equations_are_far_off(mutant):
    inputs = training_inputs("epsilon")
    assert abs(loss(**inputs).total.item() / equation(inputs, mutant) - 1) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameterization", TARGETS)
def test_the_reference_is_the_training_steps_arithmetic_bit_for_bit(parameterization, dtype):
    inputs = training_inputs(parameterization)
    inputs["prediction"] = inputs["prediction"].to(dtype).requires_grad_()
    f, clean, noise = inputs["prediction"], inputs["clean"], inputs["noise"]
    alpha, sigma = (inputs[name].to(clean.dtype).view(-1, 1, 1, 1) for name in ("alpha_B", "sigma_B"))
    target = TARGETS[parameterization](clean, noise, alpha, sigma)
    per_sample_B = (f.to(target.dtype) - target).square().flatten(1).mean(1)
    want = (per_sample_B * inputs["weight_B"].to(per_sample_B.dtype)).sum()
    got = reference.loss(**inputs)
    assert torch.equal(got.total, want) and torch.equal(got.per_sample_B, per_sample_B)
    assert torch.equal(*(torch.autograd.grad(value, f, retain_graph=True)[0] for value in (got.total, want)))


def pack(order):
    """Samples of a pack in this order, as the loss takes them."""
    rows, generator = torch.tensor(order), torch.Generator().manual_seed(6)
    tensors = {
        name: torch.randn((8, 4, 16, 20), generator=generator)[rows] for name in ("prediction", "clean", "noise")
    }
    levels = {name: torch.rand(8, generator=generator)[rows] for name in ("alpha_B", "sigma_B", "weight_B")}
    return {**tensors, **levels, "parameterization": "flow"}


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_does_not_depend_on_its_neighbours_or_its_slot(device):
    whole, moved = loss(**on(device, pack(range(8)))), loss(**on(device, pack([4, 5, 0, 1])))
    assert torch.equal(moved.per_sample_B, whole.per_sample_B[[4, 5, 0, 1]])


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_with_its_sample(device):
    plain, spoilt = on(device, pack(range(8))), on(device, pack(range(8)))
    spoilt["prediction"][2, 0, 0, 0] = torch.nan
    gradients, losses = [], []
    for arguments in (plain, spoilt):
        arguments["prediction"].requires_grad_()
        losses.append(loss(**arguments))
        gradients.append(torch.autograd.grad(losses[-1].total, arguments["prediction"])[0])
    others = [0, 1, 3, 4, 5, 6, 7]
    assert losses[1].per_sample_B[2].isnan() and losses[1].total.isnan() and gradients[1][2].isnan().any()
    assert torch.equal(losses[0].per_sample_B[others], losses[1].per_sample_B[others])
    assert torch.equal(gradients[0][others], gradients[1][others])


@pytest.mark.parametrize("device", DEVICES)
def test_total_is_the_weighted_sum(device):
    arguments = on(device, pack(range(8)))
    got = loss(**arguments)
    # Eight terms in another order: at most eight roundings of 2^-24.
    assert (got.per_sample_B * arguments["weight_B"]).sum().item() == pytest.approx(got.total.item(), rel=8 * 2.0**-24)
