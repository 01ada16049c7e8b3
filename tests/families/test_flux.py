"""FLUX.1 Kontext without a picture to edit is FLUX.1 dev: one base of the family."""

import json
import shutil

import pytest
import torch
from diffusers import FluxKontextPipeline

from dbtrain.families import FAMILIES
from dbtrain.models.load import load_models
from dbtrain.models.recognition import family_of
from dbtrain.models.sampling import make_pipeline
from dbtrain.settings.config import ModelConfig


@pytest.fixture
def kontext(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["flux"], tmp_path / "kontext")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "FluxKontextPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_kontext_draws_from_text_what_our_pipeline_draws(kontext):
    assert family_of(ModelConfig(family="auto", path=str(kontext))) == "flux"
    family = FAMILIES["flux"]
    models = load_models(family, ModelConfig(family="flux", path=str(kontext)))
    ours, stock = make_pipeline(family, models), FluxKontextPipeline.from_pretrained(kontext)
    stock.set_progress_bar_config(disable=True)
    told = {"prompt": "a dog", "height": 64, "width": 96, "num_inference_steps": 2, "output_type": "latent"}
    first = ours(generator=torch.Generator().manual_seed(0), **told).images
    again = stock(generator=torch.Generator().manual_seed(0), max_area=64 * 96, **told).images
    assert torch.equal(first, again)
