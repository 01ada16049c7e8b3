"""Generating: seeds name images, templates name subjects, an adapter leaves the base as it was."""

import numpy as np
import pytest
import torch

from dbtrain.errors import DataError
from dbtrain.families import FAMILIES
from dbtrain.models.adapters import LoraWeights, adapter, layers
from dbtrain.models.load import load_models
from dbtrain.models.sampling import generate, make_pipeline
from dbtrain.results.finished import generate_finished
from tests.kit.main_job import small_config

FAMILY = FAMILIES["sd"]


@pytest.fixture(scope="module")
def models():
    return load_models(FAMILY, small_config().model)


def arrays(images) -> list:
    return [np.asarray(image).astype(int) for image in images]


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
