"""Templates, and the paper's prompts by count and by digest of the data set's own file."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbtrain import prompts
from dbtrain.config import DataConfig, SampleConfig
from dbtrain.errors import ConfigError


def digest(templates):
    filled = [prompts.fill(one, identifier="<t>", class_noun="<c>") for one in templates]
    return hashlib.sha256("\n".join(filled).encode()).hexdigest()[:16]


def test_the_prompts_are_those_of_the_data_set():
    # sha256 over the prompts of google/dreambooth's prompts_and_classes.txt, with <t> and <c> put in, a line each.
    assert digest(prompts.OBJECT_PROMPTS) == "2af7febb6bb8e4e4"
    assert digest(prompts.LIVE_PROMPTS) == "f5ee6eec4a69aa3b"
    assert len(set(prompts.OBJECT_PROMPTS)) == len(set(prompts.LIVE_PROMPTS)) == 25
    assert len(set(prompts.OBJECT_PROMPTS) & set(prompts.LIVE_PROMPTS)) == 15


@pytest.mark.parametrize(("noun", "expected"), [
    ("dog", prompts.LIVE_PROMPTS), ("Cat", prompts.LIVE_PROMPTS), ("corgi dog", prompts.LIVE_PROMPTS),
    ("stuffed animal", prompts.OBJECT_PROMPTS), ("toy", prompts.OBJECT_PROMPTS), ("dog toy", prompts.OBJECT_PROMPTS)])
def test_live_classes_get_live_prompts(noun, expected):
    assert prompts.prompt_set(noun) is expected


def test_every_placeholder_is_filled():
    filled = prompts.fill("{identifier}, {class}, {subject}, [trigger]", identifier="sks", class_noun="dog")
    assert filled == "sks, dog, sks dog, sks"
    assert prompts.fill("a {subject} [x]", class_noun="dog") == "a dog [x]"


def test_values_are_not_filled_in_again():
    assert prompts.fill("{identifier}", identifier="{class}", class_noun="dog") == "{class}"


@pytest.mark.parametrize(("template", "message"), [
    ("a {identifer} dog", "unknown placeholder {identifer}"), ("a {} dog", "unknown placeholder {}"),
    ("a {identifier} dog", "{identifier} has no value"), ("a [trigger] dog", r"[trigger] has no value")])
def test_wrong_templates_are_errors(template, message):
    with pytest.raises(ConfigError) as error:
        prompts.fill(template, class_noun="dog")
    assert message in str(error.value)
    assert len(error.value.findings) == 1


@given(st.text().filter(lambda text: "{" not in text and "[" not in text))
def test_text_without_placeholders_is_literal(text):
    assert prompts.fill(text, identifier="sks", class_noun="dog") == text


def test_shipped_templates_can_be_filled():
    shipped = [*SampleConfig().prompts, DataConfig().caption, *sum(prompts.APPLICATIONS.values(), ())]
    for template in shipped:
        filled = prompts.fill(template, identifier="sks", class_noun="dog")
        assert "sks dog" in filled
        assert "{" not in filled
    assert prompts.fill(DataConfig().class_caption, class_noun="dog") == "a photo of a dog"
