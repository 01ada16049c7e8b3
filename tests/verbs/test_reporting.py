"""`dbtrain report`: it prints what was made, and --watch ends with the run. Pages are tested in tests/report."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.verbs import reporting
from tests.kit.made_up_run import make_run


def report(*words):
    return CliRunner().invoke(cli.app, ["report", *map(str, words)])


def test_what_was_made_is_printed_as_a_line_or_as_json(tmp_path):
    run = make_run(tmp_path / "run", 2)
    index = run / "report" / "index.html"
    assert report(run).stdout.startswith(f"{index}: 2 subjects, 2 pages made, 0 unchanged, ")
    built = json.loads(report(run, "--json").stdout)
    assert (built["made"], built["kept"], Path(built["index"])) == (0, 2, index)
    assert json.loads(report(run, "--fresh", "--json").stdout)["made"] == 2


def test_a_watch_of_a_run_that_is_over_looks_once_and_leaves_pages_that_do_not_reload(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting.time, "sleep", lambda seconds: pytest.fail("it waits for more"))
    run = make_run(tmp_path / "run", 2)
    done = report(run, "--watch", "--every", "60")
    assert done.exit_code == 0, done.output
    assert [line.split(", ")[1] for line in done.stdout.splitlines()] == ["2 pages made", "0 pages made"]
    assert "data-refresh" not in (run / "report" / "index.html").read_text()


def test_a_folder_without_a_run_is_3(tmp_path):
    wrong = report(tmp_path / "none")
    assert (wrong.exit_code, wrong.stdout) == (3, "")
