"""The table over subjects: averages from subjects' files, who is left out, and how it reads."""

import json

import pytest

from dbtrain.errors import DataError
from dbtrain.evaluate.summary import SCORES, summary, text_table, write_summary

EXACT = 1e-12  # float64


def cell(value, count=4):
    return {"value": value, "low": value, "high": value, "count": count}


def result(subject, dino, count=4, pres=0.5, encoder="embedded/identity", base="embedded", warnings=()):
    images = [{"file": f"evaluation/{row}-{i}.png", "row": row} for row in ("tuned", "base") for i in range(2)]
    return {
        "schema": 1,
        "subject": subject,
        "class": "dog",
        "base_model": base,
        "photos": 5,
        "images": images,
        "protocol": {
            "name": "quick",
            "superclass": "live",
            "prompts": 1,
            "images": 2,
            "class_images": 4,
            "steps": 9,
            "guidance": 3.0,
            "resolution": 64,
            "seed": 0,
            "class_prompt": "a photo of a dog",
        },
        "encoders": {"identity": encoder, "clip": "c", "distance": "d"},
        "scores": {"dino": cell(dino, count), "pres": cell(pres)},
        "base": {"dino": cell(0.1)},
        "real": {"dino": cell(None, 0)},
        "warnings": [{"kind": kind, "text": "t"} for kind in warnings],
    }


def test_macro_and_micro_come_from_subjects_means_and_counts():
    found = summary([result("a", 0.2, 1), result("b", 0.8, 3, warnings=("drift", "drift"))])
    assert found["macro"]["scores"]["dino"]["value"] == pytest.approx(0.5, abs=EXACT)
    assert found["micro"]["scores"]["dino"]["value"] == pytest.approx((0.2 + 3 * 0.8) / 4, abs=EXACT)
    assert (found["macro"]["scores"]["dino"]["low"], found["macro"]["scores"]["dino"]["high"]) == (0.2, 0.8)
    assert found["macro"]["real"] == {}
    assert found["counts"] == {"tuned": 4, "base": 2, "real": 10} and found["warnings"] == {"drift": 2}
    assert set(found["macro"]["scores"]) <= set(SCORES)


def test_the_table_reads_and_names_its_encoders():
    text = text_table(summary([result("a", 0.2), result("b", 0.8, warnings=("overfit",))]))
    assert "DINO             0.500 [0.200, 0.800]" in text
    assert any(line.startswith("b ") and line.endswith("overfit!") for line in text.splitlines())
    assert text.splitlines()[-1] == "DINO, PRES by embedded/identity" and "PRES is better when lower" in text
    assert "photographs" not in text
    assert "for photographs name others" in text_table(summary([result("a", 0.2, base="stable")]))
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_a_single_subject_has_no_interval():
    found = summary([result("a", 0.2)])
    assert found["macro"]["scores"]["dino"] == {"value": 0.2, "low": None, "high": None, "subjects": 1}
    lines = text_table(found).splitlines()
    assert "[" not in next(line for line in lines if line.startswith("DINO  "))
    assert any(line.startswith("no intervals over a single subject") for line in lines)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"protocol": 3}', '{"scores": Infinity', "\xff", "whole, inf", "whole, text"]
)
def test_a_damaged_file_is_named_and_the_others_are_counted(tmp_path, content):
    write(tmp_path, result("a", 0.2), result("b", 0.4), result("c", 0.4))
    odd = {"whole, inf": float("inf"), "whole, text": "high"}.get(content)
    content = json.dumps(result("b", odd)) if odd else content
    (tmp_path / "subjects" / "b" / "evaluation.json").write_bytes(content.encode("latin-1"))
    found = write_summary(tmp_path, {"d": "why"}, ["a note"])
    assert found["subjects"] == 2 and list(found["failed"]) == ["d", "b"] and "evaluate" in found["failed"]["b"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    assert "note: a note" in text_table(found)
    for name in "ac":
        (tmp_path / "subjects" / name / "evaluation.json").write_text("{}")
    with pytest.raises(DataError, match="holds no evaluated subject"):
        write_summary(tmp_path)


def write(folder, *results):
    for one in results:
        (folder / "subjects" / one["subject"]).mkdir(parents=True)
        (folder / "subjects" / one["subject"] / "evaluation.json").write_text(json.dumps(one))


def test_subjects_scored_in_another_way_are_left_out(tmp_path):
    write(tmp_path, result("a", 0.2), result("b", 0.4), result("c", 0.9, encoder="dino"))
    found = write_summary(tmp_path)
    assert (found["subjects"], found["left_out"]) == (2, 1)
    assert found["macro"]["scores"]["dino"]["value"] == pytest.approx(0.3, abs=EXACT)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found


def test_a_run_without_evaluations_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match="run `dbtrain evaluate"):
        write_summary(tmp_path)


def test_ten_thousand_subjects_take_seconds():
    import time

    results = [result(f"s{i}", i / 10_000) for i in range(10_000)]
    begin = time.process_time()
    found = summary(results)
    assert found["subjects"] == 10_000 and time.process_time() - begin < 10
