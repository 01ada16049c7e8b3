"""`export`: where it writes, what it takes for what, and what it never overwrites."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbtrain.errors import ConfigError, DataError
from dbtrain.models.adapters import LoraWeights
from dbtrain.results.exporting import export
from dbtrain.results.publish import LORA_FILE, publish_lora

PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
WEIGHTS = LoraWeights({"unet": {PATH: (torch.ones(2, 3), torch.ones(4, 2))}}, 2.0, 2)


@pytest.fixture
def subject(tmp_path):
    folder = tmp_path / "subjects" / "rex"
    folder.mkdir(parents=True)
    publish_lora(folder, WEIGHTS, {"subject": "rex", "family": "sd"}, kohya=False)
    return folder


def metadata(path):
    with safe_open(path, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("out", ["loras", "loras/", "new/", "new/deep/"])
def test_a_folder_takes_the_subjects_name(subject, tmp_path, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    path = export(subject, out)
    assert path.name == "rex.safetensors" and path.parent == (tmp_path / out).relative_to(tmp_path)
    assert metadata(path)["ss_output_name"] == "rex"


@pytest.mark.parametrize("way", ["name", "link", "hard link", "dots"])
def test_never_onto_the_source(subject, way):
    source, before = subject / LORA_FILE, (subject / LORA_FILE).read_bytes()
    out = {"name": source, "dots": subject / ".." / "rex" / LORA_FILE}.get(way, subject / "other.safetensors")
    if way == "link":
        out.symlink_to(source)
    if way == "hard link":
        os.link(source, out)
    for given in (subject, source):
        with pytest.raises(ConfigError, match="is the published file itself"):
            export(given, str(out))
    assert source.read_bytes() == before


def test_never_onto_a_file_of_another_finished_subject(subject, tmp_path):
    other = tmp_path / "subjects" / "tom"
    other.mkdir()
    publish_lora(other, WEIGHTS, {"subject": "tom"}, kohya=True)
    held = dict.fromkeys(("subject", "class", "identifier", "run", "base", "base_digest"), "x")
    (other / "record.json").write_text(json.dumps({**held, "files": {"kohya_lora.safetensors": "x"}}))
    with pytest.raises(ConfigError, match="give another file"):
        export(subject, str(other / "kohya_lora.safetensors"))


FOREIGN = {
    "kohya's version": ({"ss_base_model_version": "sdxl_base_v0-9"}, PATH, "sdxl"),
    "kohya's version of 1.5": ({"ss_base_model_version": "sd_v1"}, PATH, "sd"),
    "its layers": ({}, PATH.replace("down_blocks.1", "down_blocks.0"), "sd"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_an_adapter_made_elsewhere_is_told_from_metadata_or_names(tmp_path, case):
    said, path, family = FOREIGN[case]
    state = {f"unet.{path}.lora_A.weight": torch.ones(2, 3), f"unet.{path}.lora_B.weight": torch.ones(4, 2)}
    save_file(state, tmp_path / "a.safetensors", said)
    got = metadata(export(tmp_path / "a.safetensors", str(tmp_path / "b.safetensors")))
    assert got["ss_base_model_version"].startswith(family) and got["ss_output_name"] == "a"


def test_an_adapter_that_tells_nothing_is_refused_and_then_told(tmp_path):
    """The kind of shared/field's adapters/sdxl_unet.safetensors: names that both families have."""
    state = {f"unet.{PATH}.lora_A.weight": torch.ones(2, 3), f"unet.{PATH}.lora_B.weight": torch.ones(4, 2)}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="add --family sd or --family sdxl"):
        export(tmp_path / "a.safetensors", str(tmp_path / "b.safetensors"))
    export(tmp_path / "a.safetensors", str(tmp_path / "b.safetensors"), "sdxl")
    assert all(name.startswith("lora_unet_input_blocks_4_1_") for name in load_file(tmp_path / "b.safetensors"))
    with pytest.raises(ConfigError, match="--family: got 'xl'"):
        export(tmp_path / "a.safetensors", str(tmp_path / "b.safetensors"), "xl")


def test_pefts_folder_is_read_with_its_settings(tmp_path):
    folder = tmp_path / "zorbo"
    folder.mkdir()
    state = {f"base_model.model.{PATH}.lora_{kind}.weight": torch.ones(2, 2) for kind in "AB"}
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "peft_type": "LORA"}))
    (tmp_path / "out").mkdir()
    path = export(folder, str(tmp_path / "out"), "sd")
    alphas = [float(value) for name, value in load_file(path).items() if name.endswith(".alpha")]
    assert (path.name, alphas) == ("zorbo.safetensors", [6.0])


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_whole_model_becomes_one_file(family, model_folders, tmp_path):
    path = export(model_folders[family], str(tmp_path / "whole.safetensors"))
    assert any(name.startswith("model.diffusion_model.input_blocks.") for name in load_file(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["whole.safetensors"]
    before = path.read_bytes()
    assert export(model_folders[family], str(path)).read_bytes() == before
    weights = model_folders[family] / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ConfigError, match="give another file"):
        export(model_folders[family], str(weights))
