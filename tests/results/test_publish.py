"""Artefacts: diffusers draws our image from our adapter, model folders load, cards are safe, digests are right."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dbtrain.errors import DataError
from dbtrain.families import FAMILIES
from dbtrain.models.adapters import LoraWeights, adapter, attach, detach, layers, renamed
from dbtrain.models.load import load_models
from dbtrain.models.sampling import Chain, Enlarger, generate, make_pipeline
from dbtrain.results.publish import KOHYA_FILE, LORA_FILE, MODEL_FOLDER, publish_lora, read_lora, save_safetensors
from dbtrain.settings.config import LoraConfig, ModelConfig, PublishConfig, RunConfig, SampleConfig, TrainConfig
from dbtrain.training.trainables import publish_weights
from tests.kit.adapter_rows import read_rows
from tests.kit.published import PUBLISHED

PROVENANCE = {"subject": "rex", "dbtrain": "0"}
DRAW = {"prompts": ["a photo of a dog"], "seeds": [1], "resolution": 32, "steps": 2, "guidance": 7.5}


UNETS = ("sd", "sdxl")
"""Families whose text encoders train too; the others' adapters are compared in `contracts/test_oracles.py`."""


@pytest.fixture(scope="module")
def bases(model_folders):
    return {
        name: load_models(FAMILIES[name], ModelConfig(family=name, path=str(model_folders[name]))) for name in UNETS
    }


def random_adapter(family, models, alpha, text, rank=4):
    """Random numbers in every attention layer, in proj_in and, if `text`, in the text encoders."""
    settings = LoraConfig()
    chosen = models.components(family.denoiser) if text else {family.denoiser: models.denoiser}
    generator = torch.Generator().manual_seed(0)
    for name, module in chosen.items():
        is_denoiser = name == family.denoiser
        attach(module, (*settings.targets, "proj_in") if is_denoiser else settings.text_targets, 1, rank, alpha)
        for _, layer in layers(module):
            layer.down_NRD.data.normal_(0, 0.3, generator=generator)
            layer.up_NDR.data.normal_(0, 0.3, generator=generator)
    weights = read_rows(chosen, 0, alpha)
    for module in chosen.values():
        detach(module)
    return weights


def pixels(pipeline):
    return [np.asarray(image, dtype=int) for image in generate(pipeline, **DRAW)]


def stock_pipeline(family, folder):
    """The pipeline as a user of diffusers makes it."""
    import diffusers

    pipeline = getattr(diffusers, family.pipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("text, alpha", [(False, 4.0), (True, 1.5)], ids=["denoiser", "with text, alpha not rank"])
@pytest.mark.parametrize("name", UNETS)
def test_diffusers_draws_our_image_to_the_bit(name, text, alpha, bases, model_folders, tmp_path):
    family, models = FAMILIES[name], bases[name]
    weights = random_adapter(family, models, alpha, text)
    publish_lora(tmp_path, weights, PROVENANCE | {"family": name}, kohya=True)
    plain = pixels(make_pipeline(family, models))
    with adapter(family, models, read_lora(tmp_path)[0]):
        ours = pixels(make_pipeline(family, models))
    pipeline = stock_pipeline(family, model_folders[name])
    assert [np.abs(a - b).max() for a, b in zip(plain, pixels(pipeline))] == [0]
    pipeline.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    assert [np.abs(a - b).max() for a, b in zip(ours, pixels(pipeline))] == [0]
    assert min(np.abs(a - b).max() for a, b in zip(ours, plain)) > 8  # and the adapter did something
    assert [np.abs(a - b).max() for a, b in zip(plain, pixels(make_pipeline(family, models)))] == [0]


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_reads_the_kohya_file_alike(name, bases, model_folders, tmp_path):
    """diffusers' converter of kohya names is the independent reader; it multiplies alpha / rank into the matrices, so
    float32 sums round apart: at most one step of 255."""
    family, models = FAMILIES[name], bases[name]
    publish_lora(tmp_path, random_adapter(family, models, 1.5, True), PROVENANCE | {"family": name}, kohya=True)
    images = []
    for file in (LORA_FILE, KOHYA_FILE):
        pipeline = stock_pipeline(family, model_folders[name])
        pipeline.load_lora_weights(tmp_path, weight_name=file)
        images.append(pixels(pipeline))
    assert max(np.abs(a - b).max() for a, b in zip(*images)) <= 1


def test_read_lora_returns_what_was_published(bases, tmp_path):
    weights = random_adapter(FAMILIES["sd"], bases["sd"], 1.5, True)
    publish_lora(tmp_path, weights, PROVENANCE, kohya=False)
    assert not (tmp_path / KOHYA_FILE).exists()
    for path in (tmp_path, tmp_path / LORA_FILE):
        back, metadata = read_lora(path)
        back = renamed(bases["sd"].components("unet"), back)
        assert (back.alpha, back.rank, back.conv) == (4, 4, weights.conv)
        assert (metadata["subject"], metadata["trained_alpha"]) == ("rex", "1.5")
        for component, matrices in weights.matrices.items():
            for layer, (down, up) in matrices.items():
                assert torch.equal(back.matrices[component][layer][0], down)
                assert torch.equal(back.matrices[component][layer][1], up * (1.5 / 4))


def test_every_version_of_diffusers_finds_its_settings_and_needs_no_alpha(bases, tmp_path):
    """0.34 to 0.39 fail without both patterns; those below 0.34 take alpha for the rank. `make compat` runs them."""
    publish_lora(tmp_path, random_adapter(FAMILIES["sd"], bases["sd"], 1.5, True), PROVENANCE, kohya=False)
    with safe_open(tmp_path / LORA_FILE, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
        names = list(opened.keys())
    for component in ("unet", "text_encoder"):
        assert settings[f"{component}.r"] == settings[f"{component}.lora_alpha"] == 4
        assert settings[f"{component}.rank_pattern"] == settings[f"{component}.alpha_pattern"] == {}
        told = {f"{component}.{path}" for path in settings[f"{component}.target_modules"]}
        held = {name.partition(".lora_")[0] for name in names if name.startswith(f"{component}.")}
        assert told == {name.replace("text_model.", "") for name in held}


def test_a_file_of_dbtrain_before_the_long_names_is_read(bases, tmp_path):
    """Names without `text_model.`, alpha in the metadata, no patterns: what dbtrain 0.1.0 wrote."""
    weights = random_adapter(FAMILIES["sd"], bases["sd"], 1.5, True)
    state = {
        f"{component}.{path}.lora_{kind}.weight": matrix.reshape(*matrix.shape, *((1, 1) if is_conv else ()))
        for component, matrices in weights.matrices.items()
        for path, pair in matrices.items()
        for kind, matrix in zip("AB", pair)
        for is_conv in [f"{component}.{path}" in weights.conv]
    }
    settings = {f"{component}.lora_alpha": 1.5 for component in weights.matrices}
    save_safetensors(tmp_path / LORA_FILE, state, {"lora_adapter_metadata": json.dumps(settings)})
    images = []
    for adapted in (weights, read_lora(tmp_path)[0]):
        with adapter(FAMILIES["sd"], bases["sd"], adapted):
            images.append(pixels(make_pipeline(FAMILIES["sd"], bases["sd"])))
    assert [np.abs(a - b).max() for a, b in zip(*images)] == [0]


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_broken_adapter_is_a_data_error(tmp_path, content):
    (tmp_path / LORA_FILE).write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as an adapter"):
        read_lora(tmp_path)


def test_a_file_without_an_adapter_is_a_data_error(tmp_path):
    from safetensors.torch import save_file

    save_file({"something.else": torch.zeros(2)}, tmp_path / LORA_FILE)
    with pytest.raises(DataError):
        read_lora(tmp_path)


def test_kohya_metadata(tmp_path):
    weights = LoraWeights({"unet": {"to_q": (torch.ones(2, 3), torch.ones(3, 2))}}, 1.0, 2)
    publish_lora(tmp_path, weights, PROVENANCE, kohya=True)
    with safe_open(tmp_path / KOHYA_FILE, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], float(metadata["ss_network_alpha"])) == ("2", 1.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_model_folder_loads_as_it_is(name, model_folders, tmp_path):
    family = FAMILIES[name]
    model = ModelConfig(family=name, path=str(model_folders[name]))
    models = load_models(family, model)
    with torch.no_grad():
        next(models.denoiser.parameters()).mul_(1.5)
    config = RunConfig(model=model, train=TrainConfig(method="full"), publish=PublishConfig(dtype="fp32"))
    written = publish_weights(tmp_path, family, models, config, PUBLISHED, {})
    assert tmp_path / MODEL_FOLDER / "model_index.json" in written
    pipelines = [make_pipeline(family, models), *(stock_pipeline(family, place) for place in (
        tmp_path / MODEL_FOLDER, model_folders[name]))]  # fmt: skip
    for pipeline in pipelines[1:]:  # called with what our family says, such as the length of texts
        pipeline.dbtrain_words = pipelines[0].dbtrain_words
    ours, theirs, base = (pixels(drawing(family, pipeline))[0] for pipeline in pipelines)
    assert np.abs(ours - theirs).max() == 0
    assert np.abs(ours - base).max() > 0


def drawing(family, pipeline):
    """The pipeline; of one that enlarges, after a small picture."""
    if family.guide is None:
        return pipeline
    enlarger = Enlarger(pipeline, 4, False, family.guide.enlarged, 0, SampleConfig(steps=2), "fp32")
    return Chain([Image.effect_mandelbrot((16, 16), (-2, -1, 1, 1), 50).convert("RGB")], (enlarger,))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_folders_have_half_the_numbers(dtype, model_folders, tmp_path):
    model = ModelConfig(path=str(model_folders["sd"]))
    models = load_models(FAMILIES["sd"], model)
    before = models.denoiser.conv_in.weight.clone()
    config = RunConfig(model=model, train=TrainConfig(method="full"), publish=PublishConfig(dtype=dtype))
    publish_weights(tmp_path, FAMILIES["sd"], models, config, PUBLISHED, {})
    with safe_open(tmp_path / MODEL_FOLDER / "unet" / "diffusion_pytorch_model.safetensors", "pt") as opened:
        stored = opened.get_tensor("conv_in.weight")
    assert stored.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    unit = 2.0 ** -{"fp16": 11, "bf16": 8}[dtype]  # half a unit in the last place
    assert ((stored.float() - before).abs() <= unit * before.abs() + 2.0**-25).all()


def full_config(folder):
    publish = PublishConfig(dtype="fp32")  # the base, which is shared, is rounded otherwise
    return RunConfig(model=ModelConfig(path=str(folder)), train=TrainConfig(method="full"), publish=publish)


def test_a_model_is_on_the_disk_before_a_record_can_tell_of_it(bases, model_folders, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))
    config = full_config(model_folders["sd"])
    written = publish_weights(tmp_path, FAMILIES["sd"], bases["sd"], config, PUBLISHED, {})
    folders = {folder for path in written for folder in path.parents if folder.is_relative_to(tmp_path)}
    assert len(written) > 5
    assert [path for path in (*written, *folders) if path.stat().st_ino not in synced] == []


def test_a_model_folder_holds_nothing_of_an_earlier_writer(bases, model_folders, tmp_path):
    stale = tmp_path / MODEL_FOLDER / "image_encoder" / "model.safetensors"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of a writer that was killed")
    config = full_config(model_folders["sd"])
    written = publish_weights(tmp_path, FAMILIES["sd"], bases["sd"], config, PUBLISHED, {})
    assert stale not in written and not stale.exists()
    assert [path.name for path in tmp_path.iterdir()] == [MODEL_FOLDER]
