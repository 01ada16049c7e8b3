"""The page of a study: what it says, that pictures stand along the front, and that names are text."""

import json

import pytest

from dbtrain.report.study_page import sheet, write_page
from dbtrain.study.findings import Goal, cheapest, effects, table
from dbtrain.study.running import folder_of
from dbtrain.study.telling import Told
from tests.kit.made_photos import picture, png
from tests.kit.made_up_study import DESIGN, VARIANTS, VARY, rows

DRAWN = (("a dog", "tuned"), ("a dog", "tuned"), ("wet", "tuned"), ("any", "class"))
"""Prompts and rows of the pictures that each subject has."""


@pytest.fixture
def told(tmp_path):
    """A made-up study with pictures of two prompts and of the class prompt for each row."""
    for row in rows():
        folder = folder_of(tmp_path, row.variant, row.subject)
        (folder / "evaluation").mkdir(parents=True)
        images = []
        for number, (told, kind) in enumerate(DRAWN):
            (folder / "evaluation" / f"{number}.png").write_bytes(png(picture(seed=number)))
            images.append({"file": f"evaluation/{number}.png", "told": told, "prompt": told, "row": kind})
        (folder / "evaluation.json").write_text(json.dumps({"images": images}))
    lines = table(rows(), VARIANTS)
    goal, failed = Goal(0.65), {"recipe/b": "<script>window.pwned = 1</script>"}
    found, photos = effects(rows(), VARIANTS, VARY), {"a": (tmp_path / "gone.png",)}
    best, costs = cheapest(lines, goal), ["1000 subjects"]
    return Told(tmp_path, DESIGN, goal, rows(), lines, found, best, costs, failed, photos, {"lr-9": "too <b>dear</b>"})


def test_the_page_says_what_was_found(told, tmp_path):
    write_page(tmp_path / "study.html", told)
    page = (tmp_path / "study.html").read_text()
    said = ("4 variants of tiny_packed on 3 subjects", "0.700 [0.600, 0.800]", "1000 subjects")
    assert [words for words in said if words not in page] == []
    assert page.count("(chosen)") == 1 and page.count('class="best"') == 2
    assert all(effect.text.split(";")[0] in page for effect in told.effects)
    assert "<script" not in page and "&lt;script&gt;" in page and "too &lt;b&gt;dear" in page
    # Two variants of the front, three subjects, three pictures each; the photo of one subject cannot be read.
    assert page.count("data:image/jpeg") == 18 and page.count("cannot be read") == 1


def test_a_sheet_has_the_first_picture_of_each_prompt_along_the_front(told):
    shown = sheet(told, "b", told.best)
    assert shown["prompts"] == ["a dog", "wet", "any"] and [len(row["pictures"]) for row in shown["rows"]] == [3, 3]
    assert len({*shown["rows"][0]["pictures"]}) == 3
    assert "1.00 s, DINO 0.700, PRES 0.200" in shown["rows"][0]["facts"]


def test_a_goal_that_nothing_reaches_is_said(told, tmp_path):
    from dataclasses import replace

    write_page(tmp_path / "study.html", replace(told, goal=Goal(0.99, 0.1), chosen=None))
    assert "No variant is good enough" in (tmp_path / "study.html").read_text()
