"""The demo from end to end, as small as it gets: trained, judged, shown, and its failures told."""

import json

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.tiny import DEMO, DEMO_REAL
from dbtrain.verbs import demo

QUICK = ["train.steps=2", "train.batch=1", "prior.images=1", "prior.steps=1", "sample.images=1", "sample.steps=1",
         "sample.prompts=['a photo of {subject}']", "track.tensorboard=false"]  # fmt: skip


def run(*words):
    return CliRunner().invoke(cli.app, ["demo", *map(str, words)])


@pytest.fixture
def one_of_each(monkeypatch):
    """Two subjects instead of nine."""
    monkeypatch.setattr(demo, "COUNTS", {DEMO: 1, DEMO_REAL: 1})
    monkeypatch.setattr(demo, "CLASS_IMAGES", 1)


def test_the_demo_trains_judges_and_shows(one_of_each, tmp_path):
    result = run("--out", tmp_path / "demo", *QUICK)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if not line.startswith("[")]  # what DeepSpeed says
    assert lines[0].startswith("subject") and lines[1].startswith("dog-tan") and lines[2].startswith("real-dog")
    assert sum(line.startswith("DINO  ") for line in lines) == 2  # a table for each run
    shown = [line.removeprefix("look at ") for line in lines if line.startswith("look at ")]
    places = [tmp_path / "demo", tmp_path / "demo" / "real"]
    assert shown == [str(p / "demo.png") for p in places] + [str(p / "report" / "index.html") for p in places]
    for place, name in zip(places, ("dog-tan", "real-dog")):
        assert json.loads((place / "subjects" / name / "evaluation.json").read_text())["subject"] == name
        assert name in (place / "report" / "index.html").read_text()


def test_a_demo_in_which_subjects_fail_fails_and_still_shows_what_there_is(one_of_each, tmp_path):
    result = run("--out", tmp_path / "demo", *QUICK, "lora.alpha=1e38", "prior.weight=0")
    assert result.exit_code == 4, result.output
    assert "error: dog-tan: " in result.stderr and "failed: " in result.stdout and "look at" in result.stdout
