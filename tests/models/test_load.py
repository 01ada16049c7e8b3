"""Base models from folders, hub ids and single files: what is read, named by digests, or refused in one line."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.models.load import base_digest, load_models
from dbtrain.models.sampling import make_pipeline
from dbtrain.priors.store import prior_key
from dbtrain.settings.config import ModelConfig, RunConfig

CAPTIONS = ["a photo of a dog", "a much longer caption " + "very " * 100]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("path", ["missing-folder", "missing.safetensors", "weights.ckpt"])
def test_a_source_that_is_not_there_is_a_config_error(name, path, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_models(FAMILIES[name], ModelConfig(family=name, path=str(tmp_path / path)))


@pytest.mark.parametrize("name, other", [("sdxl", "sd"), ("sd", "sdxl"), ("flux", "sd3"), ("sd3", "sd")])
def test_a_model_of_another_family_is_a_config_error(name, other, model_folders):
    family = FAMILIES[name]
    with pytest.raises(ConfigError, match=rf"model\.path: .*{FAMILIES[other].pipeline}, .*family={name} ") as caught:
        load_models(family, ModelConfig(family=name, path=str(model_folders[other])))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_but_the_vae_is_loaded_in_bf16_if_asked(name, model_folders):
    family = FAMILIES[name]
    models = load_models(family, ModelConfig(family=name, path=str(model_folders[name]), dtype="bf16"))
    found = {part: module.dtype for part, module in models.components(family.denoiser).items()}
    assert set(found.values()) == {torch.bfloat16} and (models.vae is None or models.vae.dtype == torch.float32)


def test_zero_terminal_snr_of_an_eps_model_is_refused(model_folders):
    path = str(model_folders["sd"])
    with pytest.raises(ConfigError, match="zero_terminal_snr"):
        load_models(FAMILIES["sd"], ModelConfig(path=path, zero_terminal_snr=True))
    v = load_models(FAMILIES["sd"], ModelConfig(path=path, zero_terminal_snr=True, parameterization="v_prediction"))
    assert v.schedule.snr_S[-1] == 0


def test_what_is_trained_as_told_is_sampled_and_published_so(model_folders, tmp_path):
    """A checkpoint that does not say that it is a v-prediction model: priors and sheets would be drawn as of an epsilon
    model, and a fully fine-tuned one would be published as such."""
    folder, told = str(model_folders["sd"]), {"zero_terminal_snr": True, "parameterization": "v_prediction"}
    family, plain = FAMILIES["sd"], load_models(FAMILIES["sd"], ModelConfig(path=folder))
    models = load_models(family, ModelConfig(path=folder, **told))
    assert make_pipeline(family, plain).scheduler.config.prediction_type == "epsilon"
    make_pipeline(family, models).save_pretrained(tmp_path)
    published = load_models(family, ModelConfig(path=str(tmp_path)))
    for scheduler in (*(make_pipeline(family, models, sampler).scheduler for sampler in (None, *family.samplers)),
                      published.scheduler):  # fmt: skip
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.rescale_betas_zero_snr is True and scheduler.config.timestep_spacing == "trailing"
        assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    assert torch.equal(published.schedule.alpha_S, models.schedule.alpha_S)
    keys = [prior_key(RunConfig(model=ModelConfig(path=folder, **words)), models, "dog") for words in ({}, told)]
    assert keys[0].model == base_digest(models) and keys[0].name != keys[1].name


HUB = """
import sys, json
from dbtrain.settings.config import ModelConfig
from dbtrain.families import FAMILIES; from dbtrain.models.load import load_models
from dbtrain.models.load import base_digest
for words in ({"revision": "a" * 40}, {"revision": "b" * 40}, {"revision": "main"}):
    print(base_digest(load_models(FAMILIES["sd"], ModelConfig(path="some/model", **words))))
"""


def test_a_hub_models_digest_names_its_commit(model_folders, tmp_path):
    """A real cache of the hub's layout, without network: `main` is one of its two commits."""
    model = tmp_path / "hub" / "models--some--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("b" * 40)
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(model_folders["sd"], model / "snapshots" / commit)
    cached = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", HUB], env=cached, capture_output=True, text=True)
    a, b, main = done.stdout.split()[-3:]
    assert a != b == main, done.stderr


def test_a_hub_that_does_not_answer_is_asked_once():
    """Each of the libraries' requests is tried again for half a minute otherwise; the port of `discard` is closed."""
    closed = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    closed |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": "/nowhere/hub", "NO_PROXY": "*"}
    words = ["-c", "from dbtrain.models.load import load_tokenizer; load_tokenizer('some/model')"]
    began = time.monotonic()
    done = subprocess.run([sys.executable, *words], env=closed, capture_output=True, text=True, timeout=300)
    assert "some/model: no tokenizer found" in done.stderr
    assert "a hub id (fetched once; without network it must be in the hub's cache)" in done.stderr
    assert time.monotonic() - began < 28, "one retry of one request waits as long"


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
UNET_ENDS |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
UNET_ENDS |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}


def ldm_unet_key(key, unet):
    """CompVis' name of a diffusers U-Net key: blocks are numbered in the order they run, one list a side."""
    a_block = unet.config.layers_per_block + 1
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs, 1)
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        kind, j, rest = found.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}.{inside(kind, rest)}"
    side, i, kind, j, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key).groups()
    i, j = int(i), int(j)
    if kind == "downsamplers":
        return f"input_blocks.{(i + 1) * a_block}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        place = 2 if hasattr(unet.up_blocks[i], "attentions") else 1
        return f"output_blocks.{(i + 1) * a_block - 1}.{place}.{rest}"
    place = 1 if kind == "attentions" else 0
    if side == "down":
        return f"input_blocks.{1 + i * a_block + j}.{place}.{inside(kind, rest)}"
    return f"output_blocks.{i * a_block + j}.{place}.{inside(kind, rest)}"


def inside(kind, rest):
    name, _, end = rest.rpartition(".")
    return f"{RESNET[name]}.{end}" if kind == "resnets" else rest


def ldm_vae_key(key, levels):
    """CompVis' name of a diffusers VAE key."""
    for ours, theirs in {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        ".resnets.": ".block.",
        "down_blocks": "down",
    }.items():
        key = key.replace(ours, theirs)
    return re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", key)


def single_file(folder, models, path):
    """The SD 1.x folder as one file in the layout of CompVis' original checkpoints."""
    state = {}
    for key, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        state[f"model.diffusion_model.{ldm_unet_key(key, models.denoiser)}"] = tensor
    for key, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        name = ldm_vae_key(key, len(models.vae.config.block_out_channels))
        is_matrix = ".attn_1." in name and tensor.dim() == 2
        state[f"first_stage_model.{name}"] = tensor[..., None, None].clone() if is_matrix else tensor
    for key, tensor in models.text_encoders["text_encoder"].state_dict().items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        state[f"cond_stage_model.transformer.{name}"] = tensor.clone()
    save_file(state, path)
    return path


def test_a_single_file_gives_the_same_model_as_its_folder(model_folders, tmp_path):
    folder, family = model_folders["sd"], FAMILIES["sd"]
    models = load_models(family, ModelConfig(path=str(folder)))
    path = single_file(folder, models, tmp_path / "model.safetensors")
    settings = ModelConfig(path=str(path), single_file_layout=str(folder))
    again = load_models(family, settings)
    for name, module in {**models.components(family.denoiser), "vae": models.vae}.items():
        want = module.state_dict()
        got = again.vae.state_dict() if name == "vae" else again.components(family.denoiser)[name].state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), name
    for module in (again.denoiser, again.vae, *again.text_encoders.values()):
        assert not module.training and not any(param.requires_grad for param in module.parameters())
    assert torch.equal(again.schedule.alpha_S, models.schedule.alpha_S)
    assert torch.equal(family.tokenize(again, CAPTIONS)[0], family.tokenize(models, CAPTIONS)[0])
    assert list(again.digests) == ["model.safetensors"]


def test_a_single_file_that_is_no_model_is_a_config_error(model_folders, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"nothing": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_models(FAMILIES["sd"], ModelConfig(path=str(path), single_file_layout=str(model_folders["sd"])))


def test_what_the_index_says_to_the_pipeline_reaches_it(model_folders, tmp_path):
    """A distilled FLUX.2 klein takes no guidance: its index says so, and no weight does."""
    import json

    folder = tmp_path / "distilled"
    shutil.copytree(model_folders["flux2_klein"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    family = FAMILIES["flux2_klein"]
    for path, want in ((folder, True), (model_folders["flux2_klein"], False)):
        models = load_models(family, ModelConfig(family=family.name, path=str(path)))
        assert make_pipeline(family, models).config.is_distilled is want
