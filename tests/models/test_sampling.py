"""Sampling: seeds name images, samplers are the ones asked for, and models come back as they were."""

from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch

from dbtrain.families import FAMILIES
from dbtrain.models.adapters import LoraWeights, adapter, chosen_rows, layers, matching_layers
from dbtrain.models.load import load_models
from dbtrain.models.sampling import draw_samples, generate, image_seed, make_pipeline, modules, sampling_mode
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


def random_adapter(models, seed, rank, patterns=("attn*.to_q", "attn*.to_v")):
    """An adapter that changes pictures visibly, on the layers of some patterns."""
    stream, matrices = torch.Generator().manual_seed(seed), {}
    for path in matching_layers(models.denoiser, patterns):
        out, width = models.denoiser.get_submodule(path).weight.shape[:2]
        shapes = (rank, width), (out, rank)
        matrices[path] = tuple(torch.randn(*shape, generator=stream, dtype=torch.float64) / 2 for shape in shapes)
    return LoraWeights({"unet": matrices}, float(rank), rank)


@pytest.fixture(scope="module")
def adapters(models):
    """Three adapters that differ in rank and in layers."""
    wide = ("attn*.to_q", "attn*.to_out.0", "ff.net.2")
    return [random_adapter(models, 1, 2), random_adapter(models, 2, 3, wide), random_adapter(models, 3, 1)]


def latents_of(pipeline, prompts, seeds, rows=None):
    """What the pipeline hands to its autoencoder, in float64, with guidance."""
    told = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    with nullcontext() if rows is None else chosen_rows(modules(pipeline), rows):
        return pipeline(prompt=prompts, generator=streams, **told).images


def test_rows_of_a_stack_draw_what_each_adapter_draws_alone(models, adapters):
    """In float64, guidance included, in any order of rows: sums of a few thousand products, over three steps."""
    wide = deepcopy(models)
    for module in (wide.denoiser, wide.vae, *wide.text_encoders.values()):
        module.double()
    rows, prompts, seeds = [2, 0, 1, 0, 2], ["a dog", "a cat", "a vase", "a dog", "a cat"], [5, 6, 7, 8, 5]
    with adapter(FAMILY, wide, *adapters):
        together = latents_of(make_pipeline(FAMILY, wide), prompts, seeds, rows)
    for row, prompt, seed, latent in zip(rows, prompts, seeds, together):
        with adapter(FAMILY, wide, adapters[row]):
            (alone,) = latents_of(make_pipeline(FAMILY, wide), [prompt], [seed])
        assert alone.dtype == torch.float64 and (latent - alone).abs().max() < 1e-12 * alone.abs().max()
    plain = latents_of(make_pipeline(FAMILY, wide), prompts, seeds)
    assert (plain - together).abs().amax((1, 2, 3)).min() > 1e-3 and not layers(wide.denoiser)


def test_other_pictures_of_a_stack_change_no_bit_of_a_picture(models, adapters):
    settings = SampleConfig(images=2, steps=2, guidance=3.0)
    sizes = set()
    hook = models.denoiser.register_forward_pre_hook(lambda _, given: sizes.add(len(given[0])))
    with adapter(FAMILY, models, *adapters):
        pipeline = make_pipeline(FAMILY, models)
        one, both = (
            draw_samples(pipeline, prompts, settings, 32, batch=4, rows=rows)
            for prompts, rows in ((["a dog"], [1]), (["a cat", "a dog", "a vase"], [0, 1, 2]))
        )
    hook.remove()
    assert sizes == {8}  # a batch of four, twice for guidance: alone, two pictures of it are drawn in vain
    assert [np.array_equal(*pair) for pair in zip(arrays(one[0]), arrays(both[1]))] == [True, True]
    assert len(one) == 1 and len(one[0]) == 2 and np.abs(arrays(both[0])[0] - arrays(both[1])[0]).max() > 20
