"""The verbs about settings and this machine; the doctor's own checks are in test_doctor.py."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.models import load
from dbtrain.settings import recipes
from dbtrain.subjects import identifiers
from tests.subjects.test_identifiers import clip_tokenizer

run = CliRunner().invoke


def test_config_show_prints_what_loads_back(tmp_path):
    shown = run(cli.app, ["config", "show", "sd15_lora", "train.steps=7"]).stdout
    assert recipes.loads(shown) == recipes.load("sd15_lora", ["train.steps=7"])
    as_json = json.loads(run(cli.app, ["config", "show", "sd15_lora", "train.steps=7", "--json"]).stdout)
    assert as_json["train"]["steps"] == 7


def test_config_schema_and_recipes_are_json():
    assert json.loads(run(cli.app, ["config", "schema"]).stdout) == recipes.schema()
    assert json.loads(run(cli.app, ["config", "recipes", "--json"]).stdout) == recipes.recipe_names()
    assert run(cli.app, ["config", "recipes"]).stdout.split() == recipes.recipe_names()


def test_config_check_reports_every_file(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text("sede: 1\n")
    result = run(cli.app, ["config", "check", str(tmp_path / "a.yaml"), "tiny", str(tmp_path / "b.yaml")])
    assert result.exit_code == 2
    assert "tiny: ok" in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all(f"{name}.yaml:1: sede" in line for name, line in zip("ab", lines, strict=True))


@pytest.fixture
def tokenizer(monkeypatch):
    made = clip_tokenizer()
    monkeypatch.setattr(load, "load_tokenizer", lambda path: made, raising=False)
    return made


def test_identifiers_lists_candidates(tokenizer):
    found = json.loads(run(cli.app, ["identifiers", "--count", "3", "--json"]).stdout)
    assert [row["text"] for row in found] == [one.text for one in identifiers.candidates(tokenizer)[:3]]
    assert len(run(cli.app, ["identifiers", "--count", "3"]).stdout.splitlines()) == 3


def test_identifiers_explains_texts(tokenizer):
    good = identifiers.candidates(tokenizer)[0].text
    result = run(cli.app, ["identifiers", good, "unique", "xxy5syt00"])
    assert [line.split(": ")[1] for line in result.stdout.splitlines()] == [
        "good", "has a meaning", "splits into common letters"]
    rows = json.loads(run(cli.app, ["identifiers", "unique", "--json"]).stdout)
    assert rows[0]["verdict"] == "has a meaning"


@pytest.mark.parametrize("name", ["nowhere/x", "nowhere", "FOLDER"])
def test_a_model_that_is_not_there_has_no_tokens(name, tmp_path):
    """transformers makes an empty tokenizer of nothing, in which every text is two marks."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    result = run(cli.app, ["identifiers", "--model", str(tmp_path) if name == "FOLDER" else name, "sks"])
    assert (result.exit_code, result.stdout) == (3, "")
    assert "no tokenizer found" in result.stderr and len(result.stderr.splitlines()) == 1


WORDS = ["python", "train_dreambooth_lora.py", "--pretrained_model_name_or_path", "m",
         "--instance_prompt", "a photo of sks dog", "--foo", "1"]
COMMAND = shlex.join(WORDS)


def test_migrate_reads_standard_input_or_words(tmp_path):
    piped = run(cli.app, ["migrate", "--json"], input=COMMAND)
    words = run(cli.app, ["migrate", "--json", *WORDS])
    assert json.loads(piped.stdout) == json.loads(words.stdout)
    assert "dropped: --foo 1: unknown to dbtrain" in run(cli.app, ["migrate"], input=COMMAND).stderr


def test_migrate_writes_files_but_not_over_others(tmp_path):
    assert run(cli.app, ["migrate", "--out", str(tmp_path / "new")], input=COMMAND).exit_code == 0
    assert recipes.load(tmp_path / "new" / "recipe.yaml").train.lr == 5e-4
    assert "identifier: sks" in (tmp_path / "new" / "manifest.yaml").read_text()
    again = run(cli.app, ["migrate", "--out", str(tmp_path / "new")], input=COMMAND)
    assert again.exit_code == 2
    assert "already has recipe.yaml and manifest.yaml" in again.stderr
