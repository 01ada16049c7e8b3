"""Generating: seeds name images, templates name subjects, an adapter leaves the base as it was."""

import numpy as np
import pytest
import torch

from dbtrain.errors import DataError
from dbtrain.families import FAMILIES
from dbtrain.models.adapters import LoraWeights, adapter, layers
from dbtrain.models.load import load_models
from dbtrain.models.sampling import draw_samples, generate, image_seed, make_pipeline, sampling_mode
from dbtrain.results.finished import generate_finished
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


def test_an_adapter_acts_and_goes_without_a_trace(models):
    paths = [name for name, module in models.denoiser.named_modules() if name.endswith("attn1.to_v")]
    sizes = {path: models.denoiser.get_submodule(path).weight.shape for path in paths}
    matrices = {path: (torch.randn(2, size[1]), torch.randn(size[0], 2)) for path, size in sizes.items()}
    weights = LoraWeights({"unet": matrices}, 2.0, 2)
    before = {name: tensor.clone() for name, tensor in models.denoiser.state_dict().items()}

    def draw():
        return arrays(generate(make_pipeline(FAMILY, models), ["a dog"], [1], 32, 2, 1.0))[0]

    plain = draw()
    with adapter(FAMILY, models, weights):
        assert np.abs(draw() - plain).max() > 0
    with pytest.raises(ValueError, match="failed"), adapter(FAMILY, models, weights):
        raise ValueError("failed")
    assert np.array_equal(draw(), plain)
    assert not layers(models.denoiser)
    after = models.denoiser.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_folder_that_is_no_finished_subject_is_refused(tmp_path):
    with pytest.raises(DataError, match="give a folder under OUT/subjects/"):
        list(generate_finished([tmp_path], None, (), "x"))
