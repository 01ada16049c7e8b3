"""The model card: front matter that hubs read, code that runs, and hostile names that stay text."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from dbtrain.families import FAMILIES
from dbtrain.models.adapters import LoraWeights
from dbtrain.models.load import load_models
from dbtrain.results.card import CARD, CONFIG_FILE, TESTED, publish_card
from dbtrain.results.publish import publish_lora
from dbtrain.settings.config import ModelConfig, RunConfig, TrainConfig
from dbtrain.settings.recipes import loads, render
from tests.kit.published import PUBLISHED

HOSTILE = {
    "class": 'dog" | `rm` <script>alert(1)</script>\n---\n# injected\n- x: {a: b}',
    "caption": "a photo of srx dog'\"\n---\ntags: [evil]\n```\n<img src=x>",
    "identifier": "sr|x`<b>",
    "base": "some/base'); import os; os.system('id') #\n```\n# heading",
}


def card_of(folder, record, method="lora"):
    config = RunConfig(train=TrainConfig(method=method))
    publish_card(folder, record, config, render(config))
    card = ModelCard((folder / CARD).read_text())  # the hub's own reader
    return card.data.to_dict(), card.text, config


@pytest.mark.parametrize("method", ["lora", "full"])
def test_card_has_front_matter_that_hubs_read(tmp_path, method):
    front, body, config = card_of(tmp_path, PUBLISHED, method)
    assert front["base_model"] == "some/base" and front["instance_prompt"] == "a photo of srx dog"
    assert {"text-to-image", "dreambooth", "dbtrain"} <= set(front["tags"])
    assert ("lora" in front["tags"]) == (method == "lora") == ("load_lora_weights" in body)
    recipe = body.split("```yaml\n", 1)[1].split("```", 1)[0]
    assert loads(recipe, "card", []) == config == loads((tmp_path / CONFIG_FILE).read_text(), "file", [])


def test_the_card_shows_samples_where_there_are_some_and_code_that_loads(tmp_path):
    assert "samples.png" not in card_of(tmp_path, PUBLISHED)[1]
    (tmp_path / "samples.png").touch()
    assert "![samples](samples.png)" in card_of(tmp_path, PUBLISHED)[1]
    embedded = card_of(tmp_path, {**PUBLISHED, "base": "embedded"})[1]
    assert "from dbtrain.tiny import BASE" in embedded and "'embedded'" not in embedded
    single = card_of(tmp_path, {**PUBLISHED, "base": "b.safetensors", "family": "sdxl"})[1]
    assert "StableDiffusionXLPipeline.from_single_file('b.safetensors')" in single


def test_the_card_names_the_versions_that_make_compat_runs(tmp_path):
    source = (Path(__file__).parents[2] / "benchmarks" / "compat.py").read_text()
    versions = re.findall(r'^    "(0\.\d+\.\d+)": "transformers==', source, re.M)
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    assert len(versions) >= 6 and f"| | {' | '.join(versions)} |" in page
    for family, (oldest, newest) in TESTED.items():
        cells = re.search(rf"^\| {family}: whole model \| (.*) \|$", page, re.M)[1].split(" | ")
        able = [version for version, cell in zip(versions, cells) if cell == "0"]
        assert able == versions[versions.index(oldest) :] and newest == versions[-1]
        told = f"tested with diffusers {oldest} to {newest}"
        assert told in card_of(tmp_path, {**PUBLISHED, "family": family})[1]
    assert "tested with" not in card_of(tmp_path, {**PUBLISHED, "family": "qwen_image"})[1]


def test_the_cards_code_runs(tmp_path, monkeypatch, model_folders):
    """As a user pastes it: in the subject's folder, with the stock diffusers, offline."""
    unet = load_models(FAMILIES["sd"], ModelConfig(path=str(model_folders["sd"]))).denoiser
    layers = {path: layer.weight for path, layer in unet.named_modules() if path.endswith("attn1.to_v")}
    matrices = {path: (torch.ones(2, w.shape[1]), torch.ones(w.shape[0], 2)) for path, w in layers.items()}
    publish_lora(tmp_path, LoraWeights({"unet": matrices}, 1.5, 2), {"subject": "rex"}, kohya=False)
    body = card_of(tmp_path, {**PUBLISHED, "base": str(model_folders["sd"])})[1]
    code = body.split("```python\n", 1)[1].split("\n```", 1)[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("pipe(", "pipe(num_inference_steps=1, height=32, width=32, "), {})
    assert Image.open(tmp_path / "sample.png").size == (32, 32)


@pytest.mark.parametrize("base", ["/models/sd15", "embedded", "../sd15", "a/b/c", "/models/sd15.safetensors"])
def test_a_base_that_no_hub_has_is_not_named_in_the_front_matter(tmp_path, base):
    front, body, _ = card_of(tmp_path, {**PUBLISHED, "base": base})
    assert "base_model" not in front and f"| base | `{base}` |" in body


@pytest.mark.parametrize("field", HOSTILE)
def test_hostile_names_stay_text(tmp_path, field):
    front, body, _ = card_of(tmp_path, {**PUBLISHED, field: HOSTILE[field]})
    named = set() if field == "base" else {"base_model"}
    assert set(front) == {*named, "library_name", "instance_prompt", "tags"} and "evil" not in front["tags"]
    assert field != "caption" or front["instance_prompt"] == HOSTILE[field]
    code, outside = False, []
    for line in body.splitlines():
        if line.startswith("```"):
            code = not code
        elif not code:
            outside.append(line)
    plain = "\n".join(outside)
    assert "<script" not in plain and "<img" not in plain and "<b>" not in plain
    assert not code  # every fence is closed
    assert [line for line in outside if line.startswith("#")] == [f"# rex: {one_line(front, field)}", "## Recipe"]
    rows = [line for line in outside if line.startswith("|")]
    assert len(rows) == 11 and all(line.replace("\\|", "").count("|") == 3 for line in rows)
    python = body.split("```python\n", 1)[1].split("\n```", 1)[0]
    compile(python, "card", "exec")
    assert "os.system('id')" not in python.replace(repr(HOSTILE["base"]), "")


def one_line(front, field):
    """What the title may show of the class noun."""
    if field != "class":
        return "dog"
    return HOSTILE["class"].replace("|", "\\|").replace("`", "'").replace("\n", " ").replace("<", "&lt;")
