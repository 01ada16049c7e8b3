"""A denoiser that comes tensor by tensor: each of two ranks holds its part alone, and trains what whole ones train."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dbtrain.engines.engine import plan_batches
from dbtrain.families import FAMILIES
from dbtrain.models.load import load_models
from dbtrain.settings.config import ModelConfig
from tests.kit.main_job import small_config
from tests.kit.ranks_at_work import on_ranks

FULL = ["train.method=full", "train.batch=2", "engine.zero.stage=3", "data.resolution=64"]


def loaded_in_parts(world, name, folder):
    """(numbers that this rank holds, numbers of all, the first difference from the whole model)."""
    import deepspeed

    from dbtrain.engines.zero import load_in_parts

    config = small_config(*FULL, f"model.family={name}", f"model.path={folder}")
    models = load_models(FAMILIES[name], config.model, apart=True)
    module = load_in_parts(models.parts(), config, plan_batches(2, None, world.size), world)
    held = sum(param.ds_tensor.numel() + param.numel() for param in module.parameters())
    everything, wrong = sum(param.ds_numel for param in module.parameters()), []
    want = models.load([FAMILIES[name].denoiser])[FAMILIES[name].denoiser].state_dict()
    for path, param in module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            wrong += [] if torch.equal(param, want[path]) else [path]
    wrong += [path for path, value in module.named_buffers() if path in want and not torch.equal(value, want[path])]
    return held, everything, wrong[:1]


@pytest.mark.parametrize("name", ["sd3"])
def test_each_rank_holds_its_part_of_the_files(name, model_folders):
    for held, everything, wrong in on_ranks(2, loaded_in_parts, name, str(model_folders[name])):
        assert wrong == [] and everything > 400_000
        assert held == pytest.approx(everything / 2, rel=0.01)


def test_nothing_is_read_for_a_name(model_folders):
    models = load_models(FAMILIES["sd3"], ModelConfig(family="sd3", path=str(model_folders["sd3"])), apart=True)
    parts = models.parts()
    (file,) = (model_folders["sd3"] / "transformer").glob("*.safetensors")
    whole = load_file(file)
    assert parts.names == sorted(whole) and torch.equal(parts.tensor(parts.names[3]), whole[parts.names[3]])
    assert json.loads((file.parent / "config.json").read_text())["num_layers"] == len(parts.make().transformer_blocks)
