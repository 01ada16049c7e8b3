"""Identifiers and class nouns in prompts; `test_migrate.py` has many more."""

import pytest

from dbtrain.verbs.prompt_parts import split_prompt, template


@pytest.mark.parametrize("prompt, parts", [
    ("3d icon in the style of TOK", ("TOK", "3d icon")), ("a photo of sks dog", ("sks", "dog")),
    ("a photo of TOK yarn art dog", ("TOK", "yarn art dog")), ("a painting of a zwx cup on a table", ("zwx", "cup")),
    ("", (None, None)),
])  # fmt: skip
def test_parts_of_a_prompt(prompt, parts):
    assert split_prompt(prompt, "") == parts


def test_templates():
    assert template("3d icon in the style of TOK", "TOK", "3d icon") == "{class} in the style of {identifier}"
    assert template("A sks dog here", "sks", "dog", subject=True) == "A {subject} here"
