"""The facts of a subject: from whatever its files hold, from the ledger before the record, and as a row."""

import json

import pytest

from dbtrain.evaluate.scores import SCORES
from dbtrain.report.facts import SHOWN, Facts, differences, read_facts, row, score_table


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\0", b"[" * 100_000, b'{"a": 1} x', b"null"])
@pytest.mark.parametrize("name", ["record.json", "evaluation.json", "log.jsonl", "config.yaml"])
def test_damaged_files_are_survived(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    facts = read_facts(tmp_path, "rex", {})
    assert facts.state == "unfinished" and facts.scores == [] and facts.log == [] and facts.settings == {}
    assert bool(facts.notes) == (name.endswith(".json") and content != b"")
    json.dumps(row(facts, {}), allow_nan=False)


def test_every_field_of_a_wrong_kind_is_survived(tmp_path):
    record = {"class": ["dog"], "stages_s": [1], "steps": "many", "loss": {}, "finished": 3, "identifier": 4}
    score = {"dino": {"value": "high"}, "clip_i": 0.5, "pres": {"value": 0.4, "low": None}}
    warnings, images = [1, {"kind": 2}], [3, {"file": 4}, {}]
    evaluation = {"scores": score, "base": 3, "real": None, "warnings": warnings, "images": images}
    (tmp_path / "record.json").write_text(json.dumps(record))
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    facts = read_facts(tmp_path, "rex", {"seconds": "soon", "attempts": None, "stages_s": {"train": "x"}})
    assert [score["key"] for score in facts.scores] == ["clip_i", "pres"]
    assert (facts.class_noun, facts.seconds, facts.attempts, facts.loss) == ('["dog"]', None, None, None)
    assert facts.warnings == [{"kind": "2", "text": ""}]
    assert row(facts, {})["finished"] == "3"


def test_a_row_names_each_kind_of_warning_once():
    warnings = [{"kind": "overfit", "text": "a"}, {"kind": "drift", "text": "b"}, {"kind": "overfit", "text": "c"}]
    facts = Facts("rex", {}, {}, {"warnings": warnings}, [], {})
    assert len(facts.warnings) == 3 and row(facts, {})["warnings"] == "overfit; drift"


def test_the_ledger_counts_all_attempts_and_the_record_the_last():
    record = {"stages_s": {"train": 4.0, "save": 1.0}, "world_size": 2, "steps": 20, "loss": 0.5}
    alone = Facts("rex", record, {}, {}, [], {})
    assert (alone.state, alone.seconds, alone.device_seconds, alone.rate) == ("finished", 5.0, 10.0, 5.0)
    assert alone.attempts is None
    second = {"folder": "upscaler", "stages_s": {"train": 2.0}}
    cascade = Facts("rex", {**record, "stages": [second]}, {}, {}, [], {})
    assert cascade.stages == {"train": 4.0, "save": 1.0, "upscaler: train": 2.0}
    assert (cascade.seconds, cascade.device_seconds, cascade.rate) == (7.0, 14.0, 5.0)
    tried = Facts("rex", record, {"state": "running", "seconds": 9, "gpu_seconds": 18, "attempts": 3}, {}, [], {})
    assert (tried.state, tried.seconds, tried.device_seconds, tried.attempts) == ("running", 9.0, 18.0, 3)


def test_without_a_record_loss_and_rate_are_the_logs():
    facts = Facts("rex", {}, {}, {}, [{"step": 1, "loss": 0.9}, {"step": 2, "loss": 0.4, "steps_per_s": 8.0}], {})
    assert (facts.state, facts.loss, facts.rate, facts.seconds) == ("unfinished", 0.4, 8.0, None)


def test_prompts_are_filled_and_those_that_cannot_be_stay():
    settings = {"sample.prompts": ["a photo of {subject}", "{odd}"]}
    facts = Facts("rex", {"identifier": "srx", "class": "dog"}, {}, {}, [], settings)
    assert facts.prompts == ["a photo of srx dog", "{odd}"]


def test_a_score_table_has_the_base_and_the_photos_beside():
    cell = {"value": 0.5, "low": 0.4, "high": 0.6}
    (dino,) = score_table({"scores": {"dino": cell, "odd": cell}, "base": {"dino": 0.25}, "real": {}})
    assert (dino["name"], dino["more"], dino["value"], dino["low"]) == ("DINO", True, 0.5, 0.4)
    assert dino["base"]["value"] == 0.25 and dino["real"]["value"] is None
    assert dino["meaning"] == SCORES["dino"].meaning and score_table(None) == []


def test_the_table_has_a_column_of_each_metric_that_wants_one():
    assert SHOWN == ("dino", "clip_i", "clip_t", "pres", "div")
    evaluation = {"scores": {"dino": {"value": 0.5}, "prompt_gap": {"value": 0.1}}}
    cells = row(Facts("rex", {}, {}, evaluation, [], {}), {})
    assert {name: cells[name] for name in SHOWN} == {**dict.fromkeys(SHOWN), "dino": 0.5} and "prompt_gap" not in cells


def test_differences_are_of_known_recipes():
    assert differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == [("b", "3", "2"), ("c", "4", "")]
    assert differences({"a": ["x", "y"]}, {"a": "x"}) == [("a", "x", "x, y")]
    assert differences({}, {"a": "1"}) == []
