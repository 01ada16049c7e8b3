"""Contract of a loss weighting: finite, never negative, no runaway timestep, over every schedule we know."""

import pytest
import torch
from diffusers import DDPMScheduler

from dbtrain.objective import WEIGHTINGS
from dbtrain.objective.noise import discrete_schedule, flow_schedule
from dbtrain.objective.weighting import X0_ERROR, weight_table
from dbtrain.settings.config import ObjectiveConfig

BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02), "squaredcos_cap_v2": (0.0001, 0.02)}


def schedules(parameterization):
    if parameterization == "flow":
        return [flow_schedule(1000, shift) for shift in (1.0, 3.0, 0.5)] + [flow_schedule(2)]
    peers = [DDPMScheduler(1000, a, b, name) for name, (a, b) in BETAS.items()]
    return [discrete_schedule(peer.alphas_cumprod, parameterization, zero) for peer in peers for zero in (False, True)]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_settings_take_it(weighting):
    assert ObjectiveConfig(weighting=weighting).weighting == weighting


@pytest.mark.parametrize("parameterization", X0_ERROR)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("gamma", [0.1, 5.0, 1000.0])
def test_finite_everywhere_and_not_negative(weighting, parameterization, gamma):
    for schedule in schedules(parameterization):
        weight = weight_table(weighting, schedule, gamma)
        assert weight.shape == schedule.alpha_S.shape and weight.dtype == torch.float64
        assert torch.isfinite(weight).all() and (weight >= 0).all()
        assert weight.sum() > 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_jump_at_the_noisy_end(weighting):
    """A single timestep must not own the loss: neither by an infinite factor replaced badly, nor by a huge one."""
    for parameterization in X0_ERROR:
        for schedule in schedules(parameterization)[:6]:
            weight = weight_table(weighting, schedule, 5.0)
            assert weight[-1] <= 4 * weight[-20:-1].max() and weight.max() < 1e3 * weight.mean()


def test_debiased_is_bounded_for_eps():
    for schedule in schedules("epsilon"):
        weight = weight_table("debiased", schedule, 5.0)
        assert weight.min() >= 1e-3**0.5 * (1 - 1e-12) and weight.max() <= 1e3**0.5 * (1 + 1e-12)
