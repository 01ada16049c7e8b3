"""What is told of a study beside its page."""

import json
from dataclasses import replace

import pytest

from dbtrain.settings.recipes import load
from dbtrain.study.findings import Goal, cheapest, effects, table
from dbtrain.study.telling import Told, as_found, write_found
from tests.kit.made_up_study import DESIGN, VARIANTS, VARY, rows


@pytest.fixture
def told(tmp_path):
    lines, goal = table(rows(), VARIANTS), Goal(0.65)
    found = effects(rows(), VARIANTS, VARY)
    failed, dropped = {"x": "lost"}, {"lr-9": "dear"}
    return Told(tmp_path, DESIGN, goal, rows(), lines, found, cheapest(lines, goal), ["dear"], failed, {}, dropped)


def test_the_json_holds_all_that_was_found(told):
    write_found(told)
    found = json.loads((told.out / "study.json").read_text())
    assert found == as_found(told) and len(found["rows"]) == 12
    assert (found["failed"], found["dropped"]) == ({"x": "lost"}, {"lr-9": "dear"})
    assert [line["name"] for line in found["variants"] if line["front"]] == ["lr-2e-3-steps-60", "lr-2e-3-steps-120"]
    assert [line["name"] for line in found["variants"] if line["chosen"]] == ["lr-2e-3-steps-60"]
    assert found["variants"][0]["dino"]["subjects"] == 3


def test_the_chosen_recipe_is_a_recipe_and_goes_where_nothing_is_chosen(told):
    write_found(told)
    assert load(told.out / "recipe.yaml") == told.chosen.variant.config
    assert (told.out / "recipe.yaml").read_text().startswith("# tiny_packed with train.lr=2e-3 train.steps=60:")
    write_found(replace(told, chosen=None))
    assert not (told.out / "recipe.yaml").exists()
