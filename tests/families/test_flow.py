"""What the rectified-flow families share: shifts of known sizes, folded moments, tokens in diffusers' order."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from dbtrain.errors import ConfigError
from dbtrain.families import flow
from dbtrain.settings.config import ModelConfig

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
DYNAMIC |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}


@pytest.mark.parametrize("side, want", [(512, 1.88), (768, 2.33), (1024, 3.16)])
def test_the_shift_of_flux_grows_with_the_image(side, want):
    tokens = (side // 16) ** 2
    assert flow.shift_of(SimpleNamespace(config=DYNAMIC), tokens) == pytest.approx(want, abs=5e-3)


def test_the_shift_is_the_schedulers_own():
    """diffusers moves its sampling levels by the same factor."""
    for options, tokens, mu in (({"shift": 3.0}, 77, None), (DYNAMIC, 2304, 0.5 + 0.65 * 2048 / 3840)):
        scheduler = FlowMatchEulerDiscreteScheduler(**options)
        levels = torch.linspace(1, 0.1, 5, dtype=torch.float64)
        scheduler.set_timesteps(sigmas=levels.tolist(), mu=mu)
        s = flow.shift_of(scheduler, tokens)
        assert torch.allclose(scheduler.sigmas[:-1].double(), s * levels / (1 + (s - 1) * levels), atol=1e-6)


def test_folded_moments_are_those_of_the_scaled_sample():
    mean, logvar, noise = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    scale, shift = torch.rand(4, 1, 1) + 0.5, torch.randn(4, 1, 1)
    folded_mean, folded_logvar = flow.fold(mean, logvar, scale, shift).chunk(2, 1)
    want = (mean + torch.exp(0.5 * logvar) * noise - shift) * scale
    assert torch.allclose(folded_mean + torch.exp(0.5 * folded_logvar) * noise, want, atol=1e-6)
    nothing = flow.fold(mean, torch.full_like(logvar, -math.inf), 2.0, 0.0).chunk(2, 1)[1]
    assert (torch.exp(0.5 * nothing) == 0).all()


def test_tokens_are_in_diffusers_order_and_come_back():
    x = torch.randn(2, 16, 8, 12)
    assert torch.equal(flow.to_tokens(x), FluxPipeline._pack_latents(x, 2, 16, 8, 12))
    assert torch.equal(flow.from_tokens(flow.to_tokens(x), 8, 12), x)
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    assert torch.equal(flow.grid_ids(4, 6, x), ids)


@pytest.mark.parametrize("told", [{"parameterization": "epsilon"}, {"zero_terminal_snr": True}])
def test_settings_of_diffusion_models_are_refused(told):
    with pytest.raises(ConfigError, match="|".join(told)):
        flow.schedule(FlowMatchEulerDiscreteScheduler(), ModelConfig(**told))


def test_another_scheduler_is_refused():
    from diffusers import DDPMScheduler

    with pytest.raises(ConfigError, match="DDPMScheduler"):
        flow.schedule(DDPMScheduler(), ModelConfig())
