"""The command line: quick help with examples, exit codes, and no traceback unless it is asked for."""

import os
import resource
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from dbtrain import __version__, cli, errors
from dbtrain.settings import recipes

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
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60, env=cached)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took_s.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.stdout.splitlines()[-1] == "[]"
    assert min(took_s) < 0.5  # of the processor, which may be busy with something else


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
