"""Noise schedules against diffusers' schedulers: add_noise, zero-terminal SNR, flow sigmas."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from dbtrain.objective.noise import discrete_schedule, flow_schedule

EPS32 = 2.0**-23
BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02), "squaredcos_cap_v2": (0.0001, 0.02)}


def ddpm(beta_schedule="scaled_linear", **more):
    start, end = BETAS[beta_schedule]
    return DDPMScheduler(1000, beta_start=start, beta_end=end, beta_schedule=beta_schedule, **more)


def add_noise(clean, noise, schedule, index):
    """x_t = alpha_t x + sigma_t eps by the tables of a schedule, in float32."""
    alpha, sigma = (table_S[index].float().view(-1, 1, 1, 1) for table_S in (schedule.alpha_S, schedule.sigma_S))
    return alpha * clean + sigma * noise


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_add_noise_is_the_schedulers_at_every_timestep(beta_schedule):
    peer = ddpm(beta_schedule)
    schedule = discrete_schedule(peer.alphas_cumprod, "epsilon")
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1000, 2, 3, 3, generator=generator)
    index = torch.arange(1000)
    ours, theirs = add_noise(clean, noise, schedule, index), peer.add_noise(clean, noise, index)
    # Each side rounds alpha, sigma, two products and a sum to float32: five half-units each, of the terms' size.
    bound = 5 * EPS32 * (clean.abs() + noise.abs())
    assert ((ours - theirs).abs() <= bound).all()
    assert not torch.equal(ours, clean) and schedule.time_S.tolist() == list(range(1000))


def test_schedule_is_variance_preserving_and_gets_noisier():
    schedule = discrete_schedule(ddpm().alphas_cumprod, "epsilon")
    assert (schedule.alpha_S**2 + schedule.sigma_S**2 - 1).abs().max() < 4 * 2.0**-52
    assert (schedule.snr_S.diff() < 0).all()


def test_zero_terminal_snr_is_diffusers_rescaling():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)
    schedule = discrete_schedule(alpha_bar, "v_prediction", zero_terminal_snr=True)
    peer = (1 - rescale_zero_terminal_snr(betas)).cumprod(0).sqrt()
    # 1000 factors multiplied up again, each off by half a unit of float64.
    assert (schedule.alpha_S - peer).abs().max() < 1000 * 2.0**-53
    assert schedule.alpha_S[-1] == 0 and schedule.sigma_S[-1] == 1 and schedule.snr_S[-1] == 0
    assert schedule.alpha_S[0] == pytest.approx(alpha_bar[0].sqrt().item(), rel=1e-15)
    assert (schedule.snr_S.diff() < 0).all()


def test_zero_terminal_snr_of_a_scheduler_that_asks_for_it():
    """diffusers' own alphas_cumprod go through float32 betas; the last one is fudged to 2^-24 for its samplers."""
    peer = ddpm(rescale_betas_zero_snr=True)
    ours = discrete_schedule(ddpm().alphas_cumprod, "v_prediction", zero_terminal_snr=True)
    assert (ours.alpha_S**2 - peer.alphas_cumprod.double()).abs().max() < 1000 * EPS32 / 2


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_schedule_is_diffusers_sigmas(shift):
    peer = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    schedule = flow_schedule(1000, shift)
    # Four float32 roundings on the peer's side.
    assert (schedule.sigma_S - peer.sigmas.double().flip(0)).abs().max() < 4 * EPS32
    assert (schedule.time_S - peer.timesteps.double().flip(0)).abs().max() < 4 * EPS32 * 1000
    assert (schedule.alpha_S + schedule.sigma_S - 1).abs().max() == 0
    assert schedule.sigma_S[-1] == 1


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_noise_is_diffusers_scale_noise(shift):
    peer = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    clean, noise = torch.randn(2, 50, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    index = torch.arange(0, 1000, 20)
    theirs = peer.scale_noise(clean, peer.timesteps.flip(0)[index], noise)
    ours = add_noise(clean, noise, flow_schedule(1000, shift), index)
    assert ((ours - theirs).abs() <= 8 * EPS32 * (clean.abs() + noise.abs())).all()
