"""What the report of recipes makes of its rows."""

import pytest

from benchmarks.recipe_quality import BASE, SCORES, TRUE, summary, table, true_scores
from dbtrain.evaluate.judge import load_judge
from dbtrain.values import Subject
from dbtrain_embedded import sprites, world


def row(recipe, subject, **scores):
    return {"recipe": recipe, "seed": 0, "subject": subject, "scores": scores}


def test_true_pictures_and_the_base_come_first_and_are_compared_with_nothing():
    rows = [row(TRUE, "a", pres=0.3), row(TRUE, "b", pres=0.5)]
    for subject, before in (("a", 0.2), ("b", 0.6)):
        rows.append(row(BASE, subject, identity=before, real_identity=0.9))
        for recipe, after in (("cheap", 0.7), ("dear", 0.8)):
            scores = dict.fromkeys(SCORES, 0.5) | {"identity": after, "pres": before - 0.1, "drift": -0.1}
            rows.append(row(recipe, subject, **scores))
    found = summary(rows, {"cheap": 1.0, "dear": 4.0})
    assert [one["recipe"] for one in found] == [TRUE, BASE, "dear", "cheap"]
    true, base, dear, cheap = found
    assert [one["share"] for one in found] == [0, 0, 1, 0.25]
    assert true["pres"]["value"] == pytest.approx(0.4) and "identity" not in true and "pres" not in base
    assert true["closed"] is base["closed"] is None
    assert dear["closed"]["value"] == pytest.approx(0.8) and cheap["drift"]["value"] == pytest.approx(-0.1)
    assert [bool(one["more than the dearest"]) for one in found] == [False, False, False, True]
    assert cheap["more than the dearest"]["identity"]["value"] == pytest.approx(-0.1)
    assert len(table(found)) == 2 + 4 + 3 + 1


def test_the_class_itself_is_scored_by_its_own_drawings(tmp_path):
    """A subject that is the first of these drawings has a PRES of 1 beside it alone, and less beside all of them."""
    first = world.Facts("dog", sprites.of_noun("dog", "train")[0])
    world.render(first, world.stream(70_000)).save(tmp_path / "photo.png")
    judge, subject = load_judge(), Subject("rex", "dog", (str(tmp_path / "photo.png"),))
    assert true_scores(judge, subject, 1)["pres"] == pytest.approx(1, abs=1e-5)
    scores = true_scores(judge, subject)
    assert scores["pres"] < 0.9 and scores["div_identity"] > 0.1
