"""Which family a base is of, and whether it can be trained, by its own small files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.models import recognition
from dbtrain.models.base_check import KINDS, single_file_problem
from dbtrain.models.recognition import distilled, family_of, nearest, settled
from dbtrain.settings import recipes
from dbtrain.settings.config import ModelConfig


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def copy_of(model_folders, tmp_path):
    return lambda name: shutil.copytree(model_folders[name], tmp_path / f"base-{name}")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_each_family_is_known_and_no_other_familys(name, model_folders):
    assert family_of(ModelConfig(family="auto", path=str(model_folders[name]))) == name
    for other in set(FAMILIES) - {name}:
        config = recipes.load(None, [f"model.family={other}", f"model.path={model_folders[name]}"])
        with pytest.raises(ConfigError, match="no base of model.family") as raised:
            settled(config)
        assert len(str(raised.value).splitlines()) == 1


def test_the_embedded_base_and_auto_in_a_recipe():
    assert settled(recipes.load(None, ["model.family=auto"])) == recipes.load()


def test_a_base_of_no_family_says_what_it_is(copy_of):
    folder = copy_of("sd")
    edit(folder / "model_index.json", _class_name="HiDreamImagePipeline")
    with pytest.raises(ConfigError, match="HiDreamImagePipeline, which dbtrain does not train: its experts"):
        family_of(ModelConfig(family="auto", path=str(folder)))
    edit(folder / "model_index.json", _class_name="NewPipeline")
    with pytest.raises(ConfigError, match="is a NewPipeline; dbtrain has sd, sdxl"):
        family_of(ModelConfig(family="auto", path=str(folder)))
    edit(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(ConfigError, match="is an inpainting model"):
        family_of(ModelConfig(family="auto", path=str(folder)))
    with pytest.raises(ConfigError, match="does not exist"):
        family_of(ModelConfig(family="auto", path=str(folder / "none" / "such")))


def test_a_hub_id_is_asked_for_its_index(tmp_path, monkeypatch):
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": FAMILIES["flux"].pipeline}))
    monkeypatch.setattr(recognition, "index_path", lambda source, config: index)
    monkeypatch.setattr(recognition, "mind_the_network", lambda *_: None)
    assert family_of(ModelConfig(family="auto", path="someone/base")) == "flux"
    index.write_text(json.dumps({"_class_name": "SanaSprintPipeline"}))
    with pytest.raises(ConfigError, match="is a SanaSprintPipeline, which dbtrain does not train: it is distilled"):
        family_of(ModelConfig(family="auto", path="someone/base"))
    index.write_text(json.dumps({"_class_name": "NewPipeline"}))
    with pytest.raises(ConfigError, match="someone/base is a NewPipeline"):
        family_of(ModelConfig(family="auto", path="someone/base"))

    def absent(source, config):
        raise OSError("offline\nand more")

    monkeypatch.setattr(recognition, "index_path", absent)
    with pytest.raises(ConfigError, match="got: offline; set the family"):
        family_of(ModelConfig(family="auto", path="someone/base"))


FILES = [
    (["double_blocks.0.img_attn.qkv.weight", "guidance_in.in_layer.weight"], "flux"),
    (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "flux"),
    (["double_blocks.0.img_attn.qkv.weight", "single_stream_modulation.lin.weight"], "flux2_klein"),
    (["joint_blocks.0.x_block.attn.qkv.weight"], "sd3"),
]


@pytest.mark.parametrize("names, family", FILES, ids=lambda value: value if isinstance(value, str) else "")
def test_single_files_of_transformers(names, family, tmp_path):
    path = tmp_path / "one.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    assert family_of(ModelConfig(family="auto", path=str(path))) == family
    for other in set(FAMILIES) - {family}:
        assert "no base of model.family" in single_file_problem(FAMILIES[other], path), other


def test_a_lora_is_no_base(tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="is a LoRA"):
        family_of(ModelConfig(family="auto", path=str(tmp_path / "a.safetensors")))
    assert {pipeline for _, _, pipeline in KINDS} >= {"FluxPipeline", "StableDiffusion3Pipeline"}


@pytest.mark.parametrize("name, told", [
    ("FLUX.1-schnell", "schnell"), ("someone/Z-Image-Turbo", "Turbo"),
    ("sdxl_lightning_4step.safetensors", "lightning"),
    ("juggernautXL_v9Rdphoto2Lightning.safetensors", "Lightning"), ("hyperreal", None), ("Turbonator", None),
    ("FLUX.2-klein-4B", "klein"), ("FLUX.2-klein-base-4B", None),
    ("dev", None),
])  # fmt: skip
def test_names_of_distilled_bases(name, told):
    assert (distilled(name) or "no").endswith(f"(its name says {told})" if told else "no")


def test_files_of_distilled_bases(copy_of):
    klein, flux, sd = copy_of("flux2_klein"), copy_of("flux"), copy_of("sd")
    assert [distilled(str(folder)) for folder in (klein, flux, sd)] == [None] * 3
    edit(klein / "model_index.json", is_distilled=True)
    assert "model_index.json says so" in distilled(str(klein))
    edit(sd / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    assert "LCMScheduler" in distilled(str(sd))
    edit(flux / "transformer" / "config.json", guidance_embeds=False)
    assert distilled(str(flux)) is None, "a de-distilled dev still shifts"
    edit(flux / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False)
    assert "schnell" in distilled(str(flux))
    config = recipes.load(None, ["model.family=auto", f"model.path={flux}"])
    with pytest.raises(ConfigError, match="^model.path: .*sample with this one, or set model.distilled=true"):
        settled(config)
    assert settled(config.replaced("model.distilled", True)).model.family == "flux"


def test_the_line_that_says_most():
    assert nearest({"a": "x is a Y, no base of model.family=a; do", "b": "x is an inpainting model"}).endswith("model")
    assert nearest({"a": "x is a Y, no base of model.family=a; do"}) == "x is a Y; dbtrain has a"
