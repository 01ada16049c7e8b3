"""The verbs of the fleet: options that contradict each other are refused, and failures decide the exit code."""

import json

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.errors import DataError, EngineError
from dbtrain.verbs.batch import raise_failures

RUN = ["batch", "run", "photos.csv", "--out", "runs/all", "--config"]


@pytest.mark.parametrize("words, message", [
    (["tiny", "--gang", "2", "engine.kind=packed"], "--gang: packed training runs on one GPU"),
    (["tiny", "--gang", "3", "engine.kind=zero", "train.batch=4"], "train.batch"),
    (["tiny", "--clip", "some/encoder"], "say how to evaluate; give --evaluate too"),
    (["tiny", "train.stps=3"], "did you mean train.steps"),
])  # fmt: skip
def test_options_that_contradict_each_other_are_refused_before_anything_starts(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, [*RUN, *words])
    assert (result.exit_code, message in result.stderr) == (2, True), result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", [["status"], ["retry"], ["cancel"], ["export", "--to", "rows.csv"]])
def test_a_folder_without_a_run_is_named(tmp_path, verb):
    result = CliRunner().invoke(cli.app, ["batch", verb[0], str(tmp_path / "none"), *verb[1:]])
    assert result.exit_code == 3 and str(tmp_path / "none") in result.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("verb", [["forget"], ["batch", "forget"]])
def test_a_person_is_forgotten_by_either_verb_and_told_what_is_gone(tmp_path, verb):
    (tmp_path / "subjects" / "rex").mkdir(parents=True)
    (tmp_path / "subjects" / "rex" / "samples.png").write_bytes(b"x")
    words = [*verb, "rex", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.stderr
    assert "removed: files in subjects/rex: 2" in result.stdout and "a copy may still be in: exported" in result.stdout
    result = CliRunner().invoke(cli.app, [*words[:-3], "--json", *words[-3:]])
    assert json.loads(result.stdout)["removed"] == []
    assert CliRunner().invoke(cli.app, [*verb, "tom", "--out", str(tmp_path)]).exit_code == 3


def summary(quarantined=0, evaluated=0):
    rows = [{"subject": f"s{i}", "cause": "data", "reason": "torn"} for i in range(min(quarantined, 2))]
    return {
        "quarantined": rows,
        "subjects": {"quarantined": quarantined},
        "after": {"evaluate": {"failed": evaluated}},
    }


def test_quarantined_subjects_are_an_engine_error_and_failed_scores_a_data_error():
    raise_failures(summary(), ("evaluate", "generate"))
    with pytest.raises(DataError, match="^--evaluate: failed for 3 subjects") as failed:
        raise_failures(summary(evaluated=3), ("evaluate", "generate"))
    assert not isinstance(failed.value, EngineError)
    raise_failures(summary(evaluated=3), ("generate",))
    with pytest.raises(DataError, match="^s0: not there$") as failed:
        raise_failures(summary(), (), {"s0": DataError("not there")})
    with pytest.raises(DataError, match="and 2 more are not uploaded"):
        raise_failures(summary(), (), {f"s{number}": DataError("not there") for number in range(10)})
    with pytest.raises(EngineError) as failed:
        raise_failures(summary(quarantined=5, evaluated=3), ("evaluate",))
    assert str(failed.value).splitlines() == [
        "s0: data: torn",
        "s1: data: torn",
        "and 3 more; see `dbtrain batch export`",
        "--evaluate: failed for 3 subjects; see `dbtrain batch export`, column after",
    ]
