"""Sampling: seeds name images, samplers are the ones asked for, and models come back as they were."""

import numpy as np
import pytest
import torch

from dbtrain.families import FAMILIES
from dbtrain.models.load import load_models
from dbtrain.models.sampling import draw_samples, generate, image_seed, make_pipeline, sampling_mode
from dbtrain.settings.config import SampleConfig
from tests.kit.main_job import small_config

FAMILY = FAMILIES["sd"]


@pytest.fixture(scope="module")
def models():
    return load_models(FAMILY, small_config().model)


def arrays(images) -> list:
    return [np.asarray(image).astype(int) for image in images]


def test_image_i_of_every_prompt_has_seed_plus_i(models):
    pipeline = make_pipeline(FAMILY, models)
    settings = SampleConfig(images=2, steps=2, guidance=1.0, seed=5)
    rows = draw_samples(pipeline, ["a dog", "a cat"], settings, 32)
    assert [len(row) for row in rows] == [2, 2]
    for prompt, row in zip(("a dog", "a cat"), rows):
        alone = arrays(generate(pipeline, [prompt] * 2, [5, 6], 32, 2, 1.0, batch=1))
        # Another batch size rounds otherwise: one level of 255.
        assert all(np.abs(a - b).max() <= 1 for a, b in zip(arrays(row), alone))
        assert np.abs(alone[0] - alone[1]).max() > 20


def test_names_give_seeds_that_differ_and_stay():
    seeds = {image_seed("class", number) for number in range(1000)} | {
        image_seed("class1", 1),
        image_seed("class", "11"),
    }
    assert len(seeds) == 1001
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert image_seed("a", 1) == image_seed("a", 1) != image_seed("a1")


def test_sampling_mode_is_put_back_even_after_a_failure(models):
    models.denoiser.train()
    with pytest.raises(ValueError, match="evaluation: True"), sampling_mode(models):
        raise ValueError(f"evaluation: {not models.denoiser.training}")
    assert models.denoiser.training
    assert not models.text_encoders["text_encoder"].training
    models.denoiser.eval()


@pytest.mark.parametrize("sampler", ["ddpm", "euler_ancestral", "auto"])
def test_ancestral_samplers_add_noise_as_they_go(models, sampler):
    """From one starting noise and two streams of later noise: ancestral samplers part, the base's DDIM does not."""
    pipeline = make_pipeline(FAMILY, models, sampler)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    images = [
        pipeline(
            "a dog",
            latents=latents.clone(),
            generator=torch.Generator().manual_seed(seed),
            height=32,
            width=32,
            num_inference_steps=4,
            guidance_scale=1,
            output_type="np",
        ).images
        for seed in (1, 2)
    ]
    assert np.array_equal(*images) == (sampler == "auto")


def test_a_seed_gives_an_image_whatever_came_before(models):
    pipeline = make_pipeline(FAMILY, models, "euler_ancestral")
    first, second = (
        [np.asarray(one) for one in generate(pipeline, ["a dog"] * 2, seeds, 32, 3, 1.0, batch=1)]
        for seeds in ((1, 2), (2, 1))
    )
    assert np.array_equal(first[0], second[1])
    assert np.array_equal(first[1], second[0])
