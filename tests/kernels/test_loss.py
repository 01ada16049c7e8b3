"""The fused loss against the equation written out, with the objective's own weights; packs; the objective's targets."""

import pytest
import torch

from dbtrain.objective.noise import discrete_schedule, flow_schedule
from dbtrain.objective.target import TARGETS
from dbtrain.objective.weighting import weight_table
from dbtrain_kernels import reference
from dbtrain_kernels.cases import on
from dbtrain_kernels.loss import loss

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GAMMA, LAMBDA, BATCH = 5.0, 0.7, 3
ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
INDEX = [5, 120, 700, 20, 400, 990]  # by turns above and below SNR 5, in both roles


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


def test_the_targets_are_those_of_the_objective():
    values = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert TARGETS.keys() == reference.TARGETS.keys()
    for name in TARGETS:
        assert torch.equal(TARGETS[name](*values), reference.TARGETS[name](*values)), name


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
    """Four subjects with two samples each, subject-major in this order."""
    rows = torch.tensor([2 * n + i for n in order for i in range(2)])
    generator = torch.Generator().manual_seed(6)
    tensors = {
        name: torch.randn((8, 4, 16, 20), generator=generator)[rows] for name in ("prediction", "clean", "noise")
    }
    levels = {name: torch.rand(8, generator=generator)[rows] for name in ("alpha_B", "sigma_B", "weight_B")}
    subject_B = torch.arange(len(order)).repeat_interleave(2)
    return {**tensors, **levels, "parameterization": "flow", "subject_B": subject_B, "subjects": len(order)}


@pytest.mark.parametrize("device", DEVICES)
def test_a_subject_does_not_depend_on_its_neighbours_or_its_slot(device):
    whole = loss(**on(device, pack([0, 1, 2, 3])))
    moved = loss(**on(device, pack([2, 0])))
    assert torch.equal(moved.per_subject_N, whole.per_subject_N[[2, 0]])
    assert torch.equal(moved.per_sample_B, whole.per_sample_B[[4, 5, 0, 1]])


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_with_its_subject(device):
    inputs = on(device, pack([0, 1, 2, 3]))
    clean = loss(**inputs).per_subject_N
    inputs["prediction"][2, 0, 0, 0] = torch.nan
    inputs["prediction"].requires_grad_()
    found = loss(**inputs)
    assert found.per_subject_N.isnan().tolist() == [False, True, False, False] and found.total.isnan()
    assert torch.equal(found.per_subject_N[[0, 2, 3]], clean[[0, 2, 3]])
    (gradient,) = torch.autograd.grad(found.per_subject_N[0], inputs["prediction"])
    assert gradient[:2].abs().sum() > 0 and gradient[[3, 4, 5, 6, 7]].abs().sum() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_total_is_the_weighted_sum(device):
    inputs = on(device, pack([0, 1, 2, 3]))
    found = loss(**inputs)
    sums = (found.per_sample_B * inputs["weight_B"]).sum(), found.per_subject_N.sum()
    for value in sums:  # eight terms in another order: at most eight roundings of 2^-24
        assert value.item() == pytest.approx(found.total.item(), rel=8 * 2.0**-24)
