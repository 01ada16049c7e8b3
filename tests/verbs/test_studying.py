"""`dbtrain study` from its words to its files."""

import json

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.settings.recipes import load
from tests.kit.main_job import write_job


def run(*words):
    return CliRunner().invoke(cli.app, ["study", *map(str, words)])


def test_a_study_leaves_its_findings_a_page_and_the_chosen_recipe(tmp_path):
    words = write_job(tmp_path, "train.steps=2", "engine.packed.size=2", "prior.weight=0", subjects="rex:dog")
    asked = ("--vary", "train.lr=2e-3", "--good", "-1", "--class-images", "1", "--quiet", "--out", tmp_path / "out")
    result = run(*words, *asked, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "out" / "study.json").read_text())
    assert {line["name"] for line in found["variants"]} == {"recipe", "lr-2e-3"} and len(found["rows"]) == 2
    (chosen,) = [line for line in found["variants"] if line["chosen"]]
    own = load(tmp_path / "out" / "recipe.yaml")
    assert own == load(words[2], [*words[3:], *(f"{key}={word}" for key, word in chosen["changes"].items())])
    whole = f"{1000 * chosen['cost_s']['value']:.0f} device-seconds, 0 of them for class images"
    assert found["costs"] == [f"1000 subjects of 1 classes: {whole}"]
    assert "2 variants of" in (tmp_path / "out" / "study.html").read_text()


@pytest.mark.parametrize(
    "words, said",
    [
        (("--vary", "train.lr"), "KEY=V1,V2"),
        (("--vary", "train.lr=1e-3", "--grid", "--random", "2"), "--grid, --random"),
        (("--vary", "train.lr=1e-3", "--protocol", "short"), "--protocol"),
        (("--vary", "train.lr=fast"), "train.lr"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_any_work(tmp_path, words, said):
    result = run(*write_job(tmp_path), *words, "--out", tmp_path / "out")
    assert result.exit_code == 2 and said in result.output and not (tmp_path / "out").exists()
