"""Playground's table, sign and latents are what diffusers' EDM scheduler and script make of the same numbers."""

import pytest
import torch
from diffusers import EDMEulerScheduler

from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.families.playground import DATA, schedule
from dbtrain.models.load import load_models
from dbtrain.models.sampling import make_pipeline
from dbtrain.settings.config import ModelConfig
from dbtrain_kernels.reference import TARGETS

STREAM = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def models(model_folders):
    return load_models(FAMILIES["playground"], ModelConfig(family="playground", path=str(model_folders["playground"])))


def normal(*shape):
    return torch.randn(shape, generator=STREAM, dtype=torch.float64)


def test_input_target_and_time_are_those_of_the_script(models):
    """`train_dreambooth_lora_sdxl.py`: its U-Net's input, and the output at which its clean image has no error."""
    scheduler, table = EDMEulerScheduler(), models.schedule
    for index in (0, 400, 999):
        position = 999 - index
        sigma, time = scheduler.sigmas[position].double(), scheduler.timesteps[position]
        clean, noise = DATA * normal(1, 4, 8, 8), normal(1, 4, 8, 8)
        noisy, levels = clean + sigma * noise, (table.alpha_S[index], table.sigma_S[index])
        ours = levels[0] * clean / DATA + levels[1] * noise
        assert torch.allclose(ours, scheduler.precondition_inputs(noisy, sigma), rtol=0, atol=1e-12)
        assert table.time_S[index] == pytest.approx(float(time), abs=1e-6)
        said = -TARGETS["v_prediction"](clean / DATA, noise, *levels)
        assert torch.allclose(scheduler.precondition_outputs(noisy, said, sigma), clean, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_model_that_knows_the_picture_draws_it(models, monkeypatch):
    """Through the pipeline's own scheduler and decoding, from the codec's latents."""
    family, pixels = FAMILIES["playground"], (normal(1, 3, 64, 64).float() / 3).clamp(-1, 1)
    clean = family.codec.encode(models.vae, pixels).chunk(2, 1)[0]
    whole = models.vae.decode(models.vae.encode(pixels).latent_dist.mean, return_dict=False)[0]

    def forward(x_t, time, *places, **words):
        sigma = torch.exp(4 * time.double())
        alpha, s = DATA / (sigma**2 + DATA**2).sqrt(), sigma / (sigma**2 + DATA**2).sqrt()
        noise = (x_t - alpha * clean) / s
        return (-(alpha * noise - s * clean).float(),)

    monkeypatch.setattr(models.denoiser, "forward", forward)
    drawn = make_pipeline(family, models)(
        "a dog", height=64, width=64, num_inference_steps=8, guidance_scale=1.0, output_type="pt"
    ).images
    assert (drawn - (whole / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4


def test_other_forms_are_refused(models, model_folders):
    with pytest.raises(ConfigError, match="parameterization"):
        schedule(models.scheduler, ModelConfig(parameterization="epsilon"))
    other = load_models(FAMILIES["sdxl"], ModelConfig(family="sdxl", path=str(model_folders["sdxl"]))).scheduler
    with pytest.raises(ConfigError, match="want EDM's"):
        schedule(other, ModelConfig())
