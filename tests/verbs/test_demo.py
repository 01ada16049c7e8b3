"""The demo from end to end, as small as it gets: trained, judged, shown, and its failures told."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.results.record import stage_seconds
from dbtrain.settings.recipes import load
from dbtrain.tiny import DEMO_LARGE, DEMO_REAL
from dbtrain.verbs import demo

QUICK = ["train.steps=2", "train.batch=1", "prior.images=1", "prior.steps=1", "sample.images=1", "sample.steps=1",
         "sample.prompts=['a photo of {subject}']", "track.tensorboard=false"]  # fmt: skip


def run(*words):
    return CliRunner().invoke(cli.app, ["demo", *map(str, words)])


@pytest.fixture
def one_of_each(monkeypatch):
    """Two subjects instead of eight: one of the manifest that the demo takes, one of that which `--all` adds."""
    monkeypatch.setattr(demo, "COUNTS", {DEMO_LARGE: 1, DEMO_REAL: 1})
    monkeypatch.setattr(demo, "CLASS_IMAGES", 1)
    monkeypatch.setattr(demo, "SECOND", demo.SECOND + " train.steps=2")


@pytest.mark.parametrize("words, steps", [("tiny_packed", 150), ("tiny_packed train.steps=280", 280),
                                          ("tiny_fast_packed", 95)])  # fmt: skip
def test_its_own_recipe_alone_is_made_shorter_and_a_user_is_heeded(words, steps, tmp_path):
    recipe, *asked = words.split()
    config = load(recipe, [*demo.demo_words(recipe, tmp_path, 8), *asked])
    assert config.train.steps == steps
    assert (config.prior.steps, config.engine.packed.size, len(config.stages)) == (10, 8, 1)


def cells(sheet):
    """The pictures of the sheet's first row."""
    return [np.asarray(sheet.crop((x, 20, x + 128, 148)), dtype=int) for x in range(4, sheet.width, 132)]


def test_the_demo_trains_judges_and_shows_both_stages(one_of_each, tmp_path):
    result = run("--out", tmp_path / "demo", *QUICK)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("subject") and lines[1].startswith("dog-tan") and lines[2].startswith("real-dog")
    assert sum(line.startswith("DINO  ") for line in lines) == 2  # a table for each run
    shown = [line.removeprefix("look at ") for line in lines if line.startswith("look at ")]
    places = [tmp_path / "demo", tmp_path / "demo" / "real"]
    assert shown == [str(p / "demo.png") for p in places] + [str(p / "report" / "index.html") for p in places]
    for place, name in zip(places, ("dog-tan", "real-dog")):
        folder = place / "subjects" / name
        assert json.loads((folder / "evaluation.json").read_text())["subject"] == name
        assert name in (place / "report" / "index.html").read_text()
        assert "upscaler/pytorch_lora_weights.safetensors" in json.loads((folder / "record.json").read_text())["files"]
        *photos, plain, both = cells(Image.open(place / "demo.png"))
        small, large = (
            Image.open(folder / "samples" / sheet / "prompt-00-image-00.png") for sheet in ("samples-small", "samples")
        )
        assert len(photos) == 2 and small.size == (64, 64)
        assert np.array_equal(plain, small.resize((128, 128), Image.Resampling.BICUBIC))
        assert np.array_equal(both, large)
        assert 0 < np.abs(plain - both).mean() < 12, "stage (b) enlarges what stage (a) drew"
        record = json.loads((folder / "record.json").read_text())
        assert float(next(line for line in lines if line.startswith(name)).split()[-1]) == pytest.approx(
            sum(stage_seconds(record).values()), abs=0.06) and "upscaler: train" in stage_seconds(record)  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("samples/*/*.png")}
    assert run("--out", tmp_path / "demo", *QUICK).exit_code == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("samples/*/*.png")}
    assert before == after, "the second time nothing is drawn again"


def test_a_demo_in_which_subjects_fail_fails_and_still_shows_what_there_is(one_of_each, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "COUNTS", {DEMO_LARGE: 1, DEMO_REAL: 0})
    result = run("--out", tmp_path / "demo", *QUICK, "lora.alpha=1e38", "prior.weight=0")
    assert result.exit_code == 4, result.output
    assert "error: dog-tan: " in result.stderr and "failed: " in result.stdout and "look at" in result.stdout
    assert len(cells(Image.open(tmp_path / "demo" / "demo.png"))) == 2, "the photos alone"
    assert not (tmp_path / "demo" / "real").exists(), "photographed subjects come with --all"
