"""A whole model as one file: diffusers' `from_single_file` is the independent reader."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.models.single_file import checkpoint_of, open_clip

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_diffusers_reads_every_number_back(family, model_folders, tmp_path):
    folder, file = model_folders[family], tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in checkpoint_of(folder, family).items()}, file)
    kind = getattr(diffusers, FAMILIES[family].pipeline)
    whole, single = kind.from_pretrained(folder), kind.from_single_file(file, config=str(folder))
    for part in PARTS[: 4 if family == "sdxl" else 3]:
        ours, theirs = getattr(whole, part).state_dict(), getattr(single, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), part


def test_an_open_clip_has_query_key_and_value_in_one(model_folders):
    """Stable Diffusion 2.x and the second encoder of XL."""
    from safetensors.torch import load_file

    held = load_file(model_folders["sdxl"] / "text_encoder_2" / "model.safetensors")
    got = open_clip(held)
    layer = "text_model.encoder.layers.1.self_attn"
    joined = torch.cat([held[f"{layer}.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(got["transformer.resblocks.1.attn.in_proj_weight"], joined)
    assert torch.equal(got["text_projection"], held["text_projection.weight"].T)
    assert sum(tensor.numel() for tensor in got.values()) == sum(tensor.numel() for tensor in held.values())


@pytest.mark.parametrize("settings, marks", [
    ({"prediction_type": "v_prediction"}, {"v_pred"}), ({"prediction_type": "epsilon"}, set()),
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"})])  # fmt: skip
def test_what_the_scheduler_says_is_marked(settings, marks, model_folders, tmp_path):
    shutil.copytree(model_folders["sd"], tmp_path / "m")
    place = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **settings}))
    assert {name for name in checkpoint_of(tmp_path / "m", "sd") if "." not in name} == marks


def test_other_families_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="flux has no single file"):
        checkpoint_of(tmp_path, "flux")
