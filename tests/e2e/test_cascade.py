"""A cascade as one job: each stage is trained once, drawn through and loaded back by the stock pipelines."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from dbtrain import cli
from tests.kit.main_job import write_job

ATTENTION = "lora.targets=[attentions.*.to_q,attentions.*.add_k_proj]"
COMMON = ["train.steps=2", "train.batch=1", "lora.rank=2", "sample.steps=2", "sample.guidance=1"]
LARGE = [*COMMON, "data.resolution=64", "prior.weight=0", "train.lr=0.05", "lora.alpha=200"]  # tells subjects apart
PIXELS = ["model.family=if_stage1", "data.resolution=16", ATTENTION, "prior.sampler=ddpm"]
LATENTS = ["data.resolution=32", "prior.sampler=euler_ancestral", "engine.kind=packed", "engine.packed.size=2"]
CASES = {
    "pixels, one by one": ("if_stage1", PIXELS, "if_stage2", [ATTENTION, "sample.images=0"], 64),
    "latents, in a pack": ("sd", LATENTS, "x4_upscaler", ["data.crop=random"], 128),
}


@pytest.fixture(autouse=True)
def signals_as_before():
    import signal

    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def run(*words, code=0):
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


def stamps(folder: Path) -> dict[str, int]:
    """When the files of a subject's two stages were written, by name."""
    return {
        f"{place.name}/{name}": (place / name).stat().st_mtime_ns
        for place in (folder, folder / "upscaler")
        for name in ("record.json", "pytorch_lora_weights.safetensors")
    }


@pytest.mark.parametrize("case", CASES)
def test_both_stages_are_trained_once_and_chained(case, model_folders, tmp_path, monkeypatch):
    name, settings, second, more, side = CASES[case]
    words = write_job(tmp_path, *COMMON, "prior.images=2", *settings, subjects="tom:cat rex:dog")
    more_rows = ["tom,cat,tom,xv,0.01"] if side == 128 else []
    rows = ["subject,class,images,identifier,lr", *more_rows, "rex,dog,rex,zq,0.01"]
    (tmp_path / "photos.csv").write_text("\n".join(rows) + "\n")
    stage = [tmp_path / "small.yaml", f"model.family={second}", f"model.path={model_folders[second]}", *LARGE, *more]
    stages = "stages=" + json.dumps([" ".join(map(str, stage))])
    place = f"model.path={model_folders[name]}"
    command = ["train", *words, place, stages, "--subjects", "all", "--out", tmp_path / "out"]
    said = run(*command)
    assert said.index(f"upscaler: {second}, for {len(rows) - 1} subjects") < said.index("zq dog")
    folder = tmp_path / "out" / "subjects" / "rex"
    record, second_record = (json.loads((at / "record.json").read_text()) for at in (folder, folder / "upscaler"))
    files = {"pytorch_lora_weights.safetensors", "upscaler/pytorch_lora_weights.safetensors", "samples.png"}
    assert files <= set(record["files"]) and record["lr"] == 0.01 and second_record["lr"] == 0.05
    assert record["identifier"] == second_record["identifier"] and record["data_digest"] == second_record["data_digest"]
    assert record["stages"][0]["run"] == second_record["run"] and record["stages"][0]["level"] == 0
    for at in (folder, folder / "upscaler"):
        state = load_file(at / "pytorch_lora_weights.safetensors")
        assert any(tensor.any() for key, tensor in state.items() if ".lora_B." in key)
    assert record["stages"][0]["stages_s"] == second_record["stages_s"] and second_record["stages_s"]["train"] > 0
    assert (folder / "upscaler" / "samples").exists() == (side == 128), "sample.images=0 of a stage is its own samples"
    for sheet, of_sheet in (("samples", side), ("samples-small", side // 4)):
        drawn = [Image.open(path) for path in (folder / "samples" / sheet).glob("*.png")]
        assert drawn and {image.size for image in drawn} == {(of_sheet, of_sheet)}
    assert yaml.safe_load((folder / "config.yaml").read_text())["stages"][0]["model"]["family"] == second

    before = stamps(folder)
    run(*command)
    assert stamps(folder) == before, "what is finished is not trained again"
    (folder / "record.json").unlink()
    run(*command)
    changed = {key for key, stamp in stamps(folder).items() if stamp != before[key]}
    assert changed == {"rex/record.json", "rex/pytorch_lora_weights.safetensors"}, "the first stage alone"
    before, weights = stamps(folder), folder / "upscaler" / "pytorch_lora_weights.safetensors"
    os.truncate(weights, 100)
    run("generate", folder, code=3)
    run(*command)
    changed = {key for key, stamp in stamps(folder).items() if stamp != before[key]}
    assert changed == {"upscaler/record.json", "upscaler/pytorch_lora_weights.safetensors"}, "the harmed stage alone"
    assert len(weights.read_bytes()) > 1000
    other = [word for word in command if word is not stages] + [stages.replace("lora.rank=2", "lora.rank=3")]
    assert "other settings" in run(*other, code=3)

    run("generate", folder, "--name", "again")
    pictures = [folder / "samples" / sheet / "prompt-00-image-00.png" for sheet in ("samples", "again")]
    drawn, again = (np.asarray(Image.open(path), dtype=int) for path in pictures)
    assert np.abs(drawn - again).max() <= 1, "training drew through the subject's own adapters, in a pack too"
    run("generate", folder, "--name", "first", "stages=[]")
    pictures = [folder / "samples" / sheet / "prompt-00-image-00.png" for sheet in ("samples-small", "first")]
    kept, first = (np.asarray(Image.open(path), dtype=int) for path in pictures)
    assert np.abs(kept - first).max() <= 1, "what the first stage drew is kept beside"
    run("generate", folder, "--prompt", "{subject} in the snow", "--name", "snow")
    assert Image.open(folder / "snow.png").size[0] > side
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    exec(code, {})
    assert Image.open(folder / "sample.png").size[0] >= side
    picture = {word: np.asarray(Image.open(folder / word)).std() for word in ("sample.png", "snow.png")}
    assert all(spread > 1 for spread in picture.values()), picture


def test_an_upscaler_alone_enlarges_what_it_is_given(model_folders, tmp_path):
    words = write_job(tmp_path, *LARGE, "model.family=x4_upscaler", subjects="rex:dog")
    place = f"model.path={model_folders['x4_upscaler']}"
    run("train", *words, place, "--subjects", "all", "--out", tmp_path / "out")
    folder = tmp_path / "out" / "subjects" / "rex"
    assert {Image.open(path).size for path in (folder / "samples" / "samples").glob("*.png")} == {(64, 64)}
    refusal = run("generate", folder, code=2)
    assert "--picture" in refusal
    run("generate", folder, "--picture", next((tmp_path / "rex").iterdir()), "--name", "large")
    assert (folder / "large.png").is_file()
    refused = run("train", *words, place, "prior.weight=1", "--subjects", "all", "--out", tmp_path / "o", code=2)
    assert "enlarges and draws no class images" in refused
    refused = run("train", *words, place, "stages=[tiny]", "--subjects", "all", "--out", tmp_path / "o", code=2)
    assert "stages: sd draws from text alone" in refused
