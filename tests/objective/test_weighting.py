"""Loss weights against diffusers' compute_snr formulas, and against the clean image's error that defines them."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from dbtrain.objective.noise import discrete_schedule, flow_schedule
from dbtrain.objective.weighting import X0_ERROR, weight_table

GAMMA = 5.0
PEER = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def schedule(parameterization):
    return discrete_schedule(PEER.alphas_cumprod, parameterization)


def diffusers_min_snr(parameterization):
    """As in train_dreambooth.py (eps), train_text_to_image.py (v). For v, train_dreambooth.py has min(snr, gamma)/snr
    + 1 instead, which is not the paper's weight: its x0 loss would be min(snr, gamma) (snr + 1)/snr + snr + 1."""
    timesteps = torch.arange(1000)
    snr = compute_snr(PEER, timesteps)
    clipped = torch.stack([snr, GAMMA * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    return clipped / snr if parameterization == "epsilon" else clipped / (snr + 1)


@pytest.mark.parametrize("parameterization", ["epsilon", "v_prediction"])
def test_min_snr_is_diffusers(parameterization):
    ours, theirs = weight_table("min_snr", schedule(parameterization), GAMMA), diffusers_min_snr(parameterization)
    # Squares of float32 ratios of float32 roots: ten half-units, on the peer's side alone.
    assert ((ours - theirs.double()).abs() <= 5 * 2.0**-23 * ours).all()
    assert ours.min() < 0.1 * ours.max()


def test_snr_is_diffusers():
    theirs = compute_snr(PEER, torch.arange(1000)).double()
    assert ((schedule("epsilon").snr_S - theirs).abs() <= 5 * 2.0**-23 * theirs).all()


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_published_forms_for_eps(gamma):
    table = schedule("epsilon")
    snr = table.snr_S
    assert torch.allclose(weight_table("soft_min_snr", table, gamma), gamma / (snr + gamma), rtol=1e-12)
    clipped = torch.minimum(snr, torch.tensor(gamma))
    assert torch.allclose(weight_table("min_snr", table, gamma), clipped / snr, rtol=1e-12)
    middle = (snr > 1e-3) & (snr < 1e3)
    assert torch.allclose(weight_table("debiased", table, gamma)[middle], snr[middle].rsqrt(), rtol=1e-12)
    assert (weight_table("none", table, gamma) == 1).all()


RECOVER = {
    "epsilon": lambda x_t, y, alpha, sigma: (x_t - sigma * y) / alpha,
    "v_prediction": lambda x_t, y, alpha, sigma: alpha * x_t - sigma * y,
    "sample": lambda x_t, y, alpha, sigma: y,
    "flow": lambda x_t, y, alpha, sigma: x_t - sigma * y,
}


@pytest.mark.parametrize("parameterization", X0_ERROR)
def test_x0_error_is_the_error_of_the_recovered_image(parameterization):
    table = flow_schedule(1000, 3.0) if parameterization == "flow" else schedule(parameterization)
    alpha, sigma = table.alpha_S[:-1], table.sigma_S[:-1]  # flow's last step has alpha = 0
    x_t, y, delta = torch.randn(3, len(alpha), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    recover = RECOVER[parameterization]
    error = recover(x_t, y + delta, alpha, sigma) - recover(x_t, y, alpha, sigma)
    ratio = X0_ERROR[parameterization](alpha, sigma) * delta**2 / error**2
    # The difference of two recovered values loses |x_t|/|error| of its digits; 1e-6 leaves room for ten of them.
    assert ((ratio - 1).abs() < 1e-6)[error.abs() > 1e-6].all()
    assert (error.abs() > 1e-6).double().mean() > 0.99


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr"])
def test_eps_and_v_put_the_same_weight_on_the_clean_image(weighting):
    as_x0 = [
        weight_table(weighting, schedule(name), GAMMA) / X0_ERROR[name](schedule(name).alpha_S, schedule(name).sigma_S)
        for name in ("epsilon", "v_prediction", "sample")
    ]
    assert torch.allclose(as_x0[0], as_x0[1], rtol=1e-9) and torch.allclose(as_x0[0], as_x0[2], rtol=1e-9)


def test_an_eps_model_at_zero_snr_takes_its_neighbours_weight():
    zero = discrete_schedule(PEER.alphas_cumprod, "epsilon", zero_terminal_snr=True)
    for weighting in ("min_snr", "soft_min_snr"):
        weight = weight_table(weighting, zero, GAMMA)
        assert weight[-1] == weight[-2] == pytest.approx(1, rel=1e-6)  # SNR far below gamma: weight 1
