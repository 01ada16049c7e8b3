"""The command line: quick help with examples, exit codes, JSON, and no traceback unless it is asked for."""

import json
import os
import shlex
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from dbtrain import __version__, cli, errors
from dbtrain.models import load
from dbtrain.settings import recipes
from dbtrain.subjects import identifiers
from tests.subjects.test_identifiers import clip_tokenizer

run = CliRunner().invoke


def verbs(command=None, words=()):
    """Every verb, as its words, groups included."""
    command = command or typer.main.get_command(cli.app)
    yield list(words)
    for name, inner in getattr(command, "commands", {}).items():
        yield from verbs(inner, [*words, name])


@pytest.mark.parametrize("words", list(verbs()), ids=" ".join)
def test_every_help_has_an_example_that_starts_with_the_verb(words):
    result = run(cli.app, [*words, "--help"])
    assert result.exit_code == 0
    assert f"  dbtrain {' '.join(words)}" in result.stdout.split("Example:")[1]


def test_the_main_help_documents_exit_codes():
    text = run(cli.app, ["--help"]).stdout
    assert "Exit codes:" in text
    kinds = [errors.DbtrainError, *errors.DbtrainError.__subclasses__()]
    for code in {kind.exit_code for kind in kinds} | {cli.INTERRUPTED}:
        assert f" {code} " in text.replace("\n", " ")


HELP = """
import runpy, sys
sys.argv = ["dbtrain", "--help"]
try:
    runpy.run_module("dbtrain", run_name="__main__")
finally:
    heavy = {"torch", "transformers", "diffusers", "deepspeed", "webdataset", "pydantic", "numpy", "PIL", "ray"}
    print(sorted(heavy & set(sys.modules)))
"""


def test_help_is_quick_and_imports_nothing_heavy(tmp_path):
    cached = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    cached["PYTHONPYCACHEPREFIX"] = str(tmp_path)  # compiled files, as a user has them, but not in the sources
    took_s = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60, env=cached)
        took_s.append(time.perf_counter() - start)
        assert done.stdout.splitlines()[-1] == "[]"
    assert min(took_s) < 0.5  # the best of three: the machine may be busy with something else


@pytest.mark.parametrize("kind", [errors.DbtrainError, *errors.DbtrainError.__subclasses__()])
def test_errors_become_lines_and_exit_codes(monkeypatch, kind):
    def fail(*_):
        raise kind("first\nsecond")

    monkeypatch.setattr(recipes, "load", fail)
    result = run(cli.app, ["config", "show", "tiny"])
    assert result.exit_code == kind.exit_code
    assert result.stderr == "error: first\nerror: second\n"
    assert isinstance(run(cli.app, ["--traceback", "config", "show", "tiny"]).exception, kind)


@pytest.mark.parametrize("kind, text", [
    (MemoryError, ""), (RuntimeError, "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
    (RuntimeError, "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
])  # fmt: skip
def test_memory_that_runs_out_is_one_line_and_says_what_helps(monkeypatch, kind, text):
    def fail(*_):
        raise kind(text)

    monkeypatch.setattr(recipes, "load", fail)
    result = run(cli.app, ["config", "show", "tiny"])
    assert result.exit_code == errors.EngineError.exit_code and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: memory ran out: ") and "train.micro_batch=1" in result.stderr
    assert isinstance(run(cli.app, ["--traceback", "config", "show", "tiny"]).exception, kind)


def test_an_interrupt_is_130(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "load", interrupt)
    assert run(cli.app, ["config", "show", "tiny"]).exit_code == 130


@pytest.mark.parametrize("words", [["nonsense"], ["config", "show"], ["--nonsense"], ["identifiers", "--count", "0"]])
def test_wrong_usage_is_2(words):
    assert run(cli.app, words).exit_code == 2


def test_main_exits_with_the_code(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["config", "show", "nope"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: recipe 'nope'")


def test_a_real_process_prints_no_traceback_unless_asked():
    words = [sys.executable, "-m", "dbtrain"]
    plain = subprocess.run([*words, "config", "show", "nope"], capture_output=True, text=True, timeout=60, check=False)
    words.append("--traceback")
    asked = subprocess.run([*words, "config", "show", "nope"], capture_output=True, text=True, timeout=60, check=False)
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    assert "Traceback" in asked.stderr


def test_version():
    assert run(cli.app, ["--version"]).stdout.strip() == __version__


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


@pytest.mark.parametrize("words, message", [
    (["pack", "--sizes", "1,x"], "--sizes: got '1,x', want numbers from 1"),
    (["pack", "--sizes", "0"], "--sizes: got '0'"),
    (["pack", "--sizes", "1", "--subjects", "4,"], "--subjects: got '4,'"),
    (["step", "--sizes", ""], "--sizes: got ''"),
    (["step", "--capture", "off,grph"], "--capture: got 'off,grph', want auto, graph, compile, off"),
    (["step", "--attention", "sdp"], "--attention: got 'sdp', want auto, sdpa"),
])  # fmt: skip
def test_lists_of_bench_are_checked(words, message):
    result = run(cli.app, ["bench", *words])
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


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
