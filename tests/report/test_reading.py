"""Files of a run that are missing, cut, damaged or hostile are notes on a page, never errors."""

import json
import math

import pytest

from dbtrain.report.reading import (
    MAX_BYTES,
    RUN_BYTES,
    inside,
    number,
    numbers,
    read_log,
    read_object,
    settings,
    stamps,
    text,
)


def test_a_log_line_that_is_being_written_is_left_out(tmp_path):
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("nan")}, {"no": "step"}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    found = read_log(tmp_path, [])
    assert [line["step"] for line in found] == [1, 2]
    assert number(found[1]["loss"]) is None


def test_of_a_huge_log_the_end_is_read(tmp_path):
    line = json.dumps({"step": 7, "note": "x" * 1000}) + "\n"
    (tmp_path / "log.jsonl").write_text(line * (MAX_BYTES // 1000 + 10) + '{"step": 8}\n')
    found = read_log(tmp_path, [])
    assert found[-1]["step"] == 8 and len(found) < MAX_BYTES // 1000 + 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None, [1], 10**400, 1e308, -1e15])
def test_what_is_no_finite_number_is_none(value):
    assert number(value) is None
    assert numbers({"a": value, "b": 2}) == {"b": 2.0}


def test_a_huge_object_is_not_read_by_its_end_and_a_huge_run_is(tmp_path):
    path, notes = tmp_path / "evaluation.json", []
    path.write_text(json.dumps({"macro": {"scores": {}}, "by_subject": ["x" * 1000] * (MAX_BYTES // 1000)}))
    assert read_object(path, notes) == {} and notes == ["evaluation.json is not read: it is larger than 4 MiB"]
    assert read_object(path, [], RUN_BYTES)["macro"] == {"scores": {}}


def test_texts_are_bounded():
    assert text("x" * 5000, 100) == "x" * 99 + "…"
    assert (text(None), text({"a": 1}), text(3)) == ("", '{"a": 1}', "3")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png", "a\0b", "", ".", None, 3, "no.png"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(b"s")
    folder = tmp_path / "rex"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "own.png").write_bytes(b"o")
    assert inside(folder, name) is None
    assert inside(folder, "own.png") == folder / "own.png"


def test_settings_are_dotted_texts():
    assert settings("a: {b: 1e-4, c: [x, 'y z']}\nd: null\n") == {"a.b": "1e-4", "a.c": ["x", "y z"], "d": "null"}
    assert settings("a: &x 1\nb: *x\n") == {} and settings("- 1\n") == {}
    assert settings("a: !!python/object/apply:os.getcwd []\n") == {"a": []}  # a tag makes nothing


def test_only_files_of_known_names_count_as_inputs(tmp_path):
    for name in ("record.json", "other.json", "samples/samples/prompt-00-image-00.png", "samples/samples/x.png",
                 "samples/step-000100/prompt-00-image-01.png", "samples/evil/prompt-00-image-00.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [name for name, _, _ in stamps(tmp_path)] == [
        "record.json", "samples/samples/prompt-00-image-00.png", "samples/step-000100/prompt-00-image-01.png"
    ]  # fmt: skip
    assert stamps(tmp_path / "nowhere") == []


def test_objects_are_read(tmp_path):
    (tmp_path / "record.json").write_text('{"a": 1}')
    assert read_object(tmp_path / "record.json", []) == {"a": 1}
