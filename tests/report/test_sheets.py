"""The pictures of a page: which seeds they were drawn with, and what is left out."""

import json
import re

from dbtrain.report import build
from dbtrain.settings.recipes import loads, render
from tests.kit.made_up_run import PROMPTS, make_subject, picture
from tests.report.conftest import page


def test_rows_are_named_by_the_seeds_that_drew_them_and_more_are_counted(tmp_path):
    recipe = render(loads(f"sample: {{seed: 40, images: 5, prompts: {json.dumps(list(PROMPTS))}}}"))
    make_subject(tmp_path / "subjects" / "rex", 0, ("step-000100", "samples"), recipe, [picture(0)], seeds=5)
    build(tmp_path)
    told = page(tmp_path, "rex")
    assert re.findall(r'<th scope="row">seed (\d+)</th>', told) == ["40", "41"] * len(PROMPTS)
    assert 'alt="a photo of qav dog, seed 41"' in told
    assert "3 more seeds of each prompt are not shown" in told


def test_without_a_recipe_the_first_seed_is_the_default(tmp_path):
    make_subject(tmp_path / "subjects" / "rex", 0, ("samples",), "sample: {seed: many}", [picture(0)])
    build(tmp_path)
    told = page(tmp_path, "rex")
    assert re.findall(r'<th scope="row">seed (\d+)</th>', told)[:2] == ["0", "1"] and "more seeds" not in told
