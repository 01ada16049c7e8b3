"""Stability's layer names against diffusers' own converter, and there and back."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from dbtrain.families.sd import SD15
from dbtrain.families.sdxl import XL
from dbtrain.models.stability_names import from_stability, to_stability

ATTENTIVE = {"sd": frozenset({1, 2, 3}), "sdxl": frozenset({0, 1})}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def unet(request):
    """(family, published U-Net without weights)."""
    with torch.device("meta"):
        return request.param, UNet2DConditionModel(**{"sd": SD15, "sdxl": XL}[request.param].config)


def test_diffusers_converter_undoes_the_names(unet):
    family, model = unet
    theirs = {}
    for name, value in model.state_dict().items():
        path, _, last = name.rpartition(".")
        theirs[f"model.diffusion_model.{to_stability(path, 2, ATTENTIVE[family])}.{last}"] = value
    assert len(theirs) == len(model.state_dict())
    back = convert_ldm_unet_checkpoint(theirs, dict(model.config))
    assert {name: value.shape for name, value in back.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_there_and_back(unet):
    family, model = unet
    paths = {name.rpartition(".")[0] for name in model.state_dict()}
    assert all(from_stability(to_stability(path, 2, ATTENTIVE[family])) == path for path in paths)


@pytest.mark.parametrize("name", ["nowhere", "input_blocks.x.0", "middle_block.7.y", "input_blocks.1.5.y"])
def test_other_names_are_no_layers(name):
    with pytest.raises((KeyError, StopIteration, IndexError)):
        from_stability(name)
    with pytest.raises(KeyError):
        to_stability(name)
