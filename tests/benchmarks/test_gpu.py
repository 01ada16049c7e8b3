"""The check on a GPU, as far as it goes without one: its clock, its parts, its exit codes, its wheels."""

import os
import sys
from pathlib import Path

import pytest
import typer

from benchmarks import gpu
from benchmarks.gpu import Clock, Part, measured, parts, pinned, run
from dbtrain.verbs.bench import APPS

ROOT = Path(gpu.ROOT)
SPEAKS = "import sys, time; print('result'); print('row 1', file=sys.stderr, flush=True); "


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_S", 0.1)


def part(code, limit_s=60, tests=False):
    return Part("part", limit_s, ("-c", SPEAKS + code), tests)


def test_a_part_that_is_stopped_leaves_what_it_said(tmp_path, capsys):
    assert run(part("time.sleep(60)", limit_s=3), Clock(100), tmp_path, dict(os.environ)) is None
    assert (tmp_path / "part.txt").read_text() == "row 1\n"
    assert "row 1\n== part: out of time" in capsys.readouterr().out


def test_one_clock_runs_for_all(tmp_path):
    assert run(part("time.sleep(60)"), Clock(1), tmp_path, dict(os.environ)) is None
    assert run(part(""), Clock(0), tmp_path, dict(os.environ)) is None


def test_results_and_what_is_said_are_kept_apart(tmp_path):
    assert run(part("sys.exit(4)"), Clock(100), tmp_path, dict(os.environ)) == 4
    assert (tmp_path / "part.out").read_text() == "result\n" and (tmp_path / "part.txt").read_text() == "row 1\n"
    assert run(part("", tests=True), Clock(100), tmp_path, dict(os.environ)) == 0
    assert set((tmp_path / "part.txt").read_text().split("\n")) == {"result", "row 1", ""}


@pytest.mark.parametrize(
    "tests, bench, code", [("", "", 0), ("sys.exit(1)", "", 1), ("", "sys.exit(1)", 0), ("time.sleep(60)", "", 1)]
)
def test_the_exit_code_is_that_of_the_tests(tests, bench, code, monkeypatch, tmp_path):
    made = [part(tests, 1 if "sleep" in tests else 60, True), part(bench)]
    monkeypatch.setattr(gpu, "parts", lambda: made)
    monkeypatch.setattr(gpu, "VERSIONS", "")
    assert gpu.check(Clock(100), tmp_path, dict(os.environ)) == code


def test_correctness_comes_first_and_the_tests_are_all_that_need_a_gpu():
    order = [one.tests for one in parts()]
    assert order == sorted(order, reverse=True) and any(order)
    folders = [word for one in parts() if one.tests for word in one.words if word.startswith("tests/")]
    marked = [path for path in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text("utf-8")]
    names = [str(path.relative_to(ROOT)) for path in marked if path.name != Path(__file__).name]
    assert names and not [name for name in names if not name.startswith(tuple(folders))]


@pytest.mark.parametrize("one", [one for one in parts() if not one.tests], ids=lambda one: one.name)
def test_every_bench_is_one_that_dbtrain_has(one):
    _, _, bench, verb, *words = one.words
    command = typer.main.get_command(APPS["bench"]).commands[verb]
    assert bench == "bench" and command.make_context(verb, words).params["as_json"]


def test_the_wheels_are_of_the_versions_that_were_tested_together():
    lines = (ROOT / "constraints.txt").read_text("utf-8").lower().replace("_", "-").splitlines()
    assert {name.lower().replace("_", "-") for name in pinned(gpu.WHEELS)} <= set(lines)


@pytest.mark.slow
def test_neither_ray_nor_deepspeed_is_needed_to_read_the_tests(tmp_path):
    """Tests of what needs them are left out, and no other test imports them."""
    (tmp_path / "without.py").write_text("import sys\nsys.modules.update(ray=None, deepspeed=None)\n")
    words = [one.words for one in parts() if one.tests]
    paths = [word for one in words for word in one if word.startswith("tests/")]
    collect = ("-m", "pytest", "-p", "without", "-p", "no:cacheprovider", "-q", "-m", "gpu", "--collect-only")
    path = os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)])
    more = ("tests/fleet", "tests/engines")
    part = Part("collect", 250, (*collect, *paths, *more), True)
    assert run(part, Clock(250), tmp_path, {**os.environ, "PYTHONPATH": path}) == 0


def test_a_measured_part_asks_for_numbers_that_a_program_reads():
    assert measured("x", 1, "ops").words[-1] == "--json"
