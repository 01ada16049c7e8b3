"""docs/results.md and the README's figures are what the result files say today."""

import pytest

from benchmarks import results_figures, results_page


def test_both_pages_are_up_to_date():
    """`python benchmarks/results_page.py` makes them so."""
    assert results_page.PAGE.read_text("utf-8") == results_page.page()
    text = results_page.README.read_text("utf-8")
    assert text == results_page.readme(text)
    text = results_page.FAMILIES.read_text("utf-8")
    assert text == results_page.families(text)


def test_the_readme_has_five_figures():
    assert len(results_page.five_figures().splitlines()) == 2 + 5


@pytest.mark.parametrize("path", sorted(results_page.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_is_on_the_page_with_its_commit(path):
    page = results_page.page()
    assert f"[{path.name}](../benchmarks/results/{path.name})" in page
    assert path.with_suffix(".md").exists()


def test_a_result_says_its_machine_commit_and_command():
    result = {"about": {"machine": "a machine", "commit": "abc", "command": "make it"}}
    assert results_page.provenance(result, "") == ["a machine; commit `abc`; `make it`"]
    assert results_page.provenance({"part": result}, "") == ["part: a machine; commit `abc`; `make it`"]
    assert results_page.provenance({"commit": "abc", "machine": "m"}, "x") == ["m; commit `abc`; `x`"]


@pytest.mark.parametrize("ratio, said", [(1.25, "1.25 times less"), (0.8, "1.25 times more")])
def test_a_ratio_is_said_in_words(ratio, said):
    assert results_figures.times(ratio) == said
