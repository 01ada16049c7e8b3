"""Templates, the shipped prompt sets, and the paper's prompts by count and by digest of the data set's own file."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbtrain.errors import ConfigError
from dbtrain.settings.config import DataConfig, SampleConfig
from dbtrain.subjects import prompts


def digest(templates):
    filled = [prompts.fill(one, identifier="<t>", class_noun="<c>") for one in templates]
    return hashlib.sha256("\n".join(filled).encode()).hexdigest()[:16]


def test_the_prompts_are_those_of_the_data_set():
    # sha256 over the prompts of google/dreambooth's prompts_and_classes.txt, with <t> and <c> put in, a line each.
    of_object, of_live = prompts.prompt_set("vase"), prompts.prompt_set("dog")
    assert digest(of_object) == "2af7febb6bb8e4e4"
    assert digest(of_live) == "f5ee6eec4a69aa3b"
    assert len(set(of_object)) == len(set(of_live)) == 25
    assert len(set(of_object) & set(of_live)) == 15


LIVE = ["dog", "Cat", "corgi dog", " Corgi  dog ", "person"]
OBJECTS = ["stuffed animal", "toy", "dog toy", "", "teapot", "hot dog", "Teddy Bear", "brown plush rabbit"]


@pytest.mark.parametrize("noun", LIVE + OBJECTS)
def test_live_classes_get_live_prompts(noun):
    assert prompts.prompt_set(noun) == prompts.prompt_set("dog" if noun in LIVE else "vase")


def test_what_is_live_can_be_said():
    assert prompts.is_live("garden gnome", {"garden gnome"}) and not prompts.is_live("gnome", {"garden gnome"})
    assert prompts.prompt_set("dog", live={"gnome"}) == prompts.prompt_set("vase")


@pytest.mark.parametrize("name", prompts.set_names())
@pytest.mark.parametrize("noun", ["dog", "vase"])
def test_every_shipped_set_can_be_filled_for_every_class(name, noun):
    templates = prompts.application(name, noun)
    assert templates and len(set(templates)) == len(templates)
    for template in templates:
        assert template.count("{subject}") == 1
        assert f"sks {noun}" in prompts.fill(template, identifier="sks", class_noun=noun)


def test_the_applications_of_the_paper_ship():
    assert {"recontext", "views", "properties", "accessories", "art"} <= set(prompts.set_names())
    assert prompts.application("views", "car")[:4] == tuple(
        f"a {{subject}} seen from the {side}" for side in ("top", "bottom", "side", "back")
    )
    assert "a cross of a {subject} and a panda" in prompts.application("properties", "dog")
    assert "a cross of a {subject} and a panda" not in prompts.application("properties", "car")
    assert any("Van Gogh" in template or "van Gogh" in template for template in prompts.application("art", "dog"))


def test_a_set_of_ones_own(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("paper: {all: [a {subject}]}\nmore: {live: ['my {subject} sleeps']}\n".replace("[a {", "['a {")
                   .replace("}]}\nm", "}']}\nm"))
    assert prompts.application(str(own), "dog") == ("a {subject}", "my {subject} sleeps")
    assert prompts.application(str(own), "vase") == ("a {subject}",)


@pytest.mark.parametrize("text", ["[a]", "more: [a]", "more: {all: a}", "more: {all: []}", "other: {all: [a]}",
                                  "more: {both: [a]}", "more: {all: [1]}", "more: {all: [a", ""])
def test_what_is_no_set_is_refused(tmp_path, text):
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(ConfigError, match=r"own.yaml(:\d+)?: (is no prompt set; want `paper:`|cannot be read as)"):
        prompts.read_set(str(own))


def test_unknown_sets_and_placeholders_are_named(tmp_path):
    with pytest.raises(ConfigError, match="'view': is not there; sets are accessories, art"):
        prompts.read_set("view")
    (tmp_path / "own.yaml").write_text("more: {all: ['a {sbject}']}")
    with pytest.raises(ConfigError, match="unknown placeholder {sbject}"):
        prompts.read_set(str(tmp_path / "own.yaml"))


def test_every_placeholder_is_filled():
    filled = prompts.fill("{identifier}, {class}, {subject}, [trigger]", identifier="sks", class_noun="dog")
    assert filled == "sks, dog, sks dog, sks"
    assert prompts.fill("a {subject} [x]", class_noun="dog") == "a dog [x]"


def test_json_keeps_its_braces():
    """As Ideogram 4 wants its captions."""
    told = {"scene": {"text": "a {subject} on grass"}, "elements": [{"type": "obj"}, {"type": "{class}"}]}
    for indent in (None, 1):
        filled = json.loads(prompts.fill(json.dumps(told, indent=indent), identifier="sks", class_noun="dog"))
        assert filled == {"scene": {"text": "a sks dog on grass"}, "elements": [{"type": "obj"}, {"type": "dog"}]}


@pytest.mark.parametrize("template", ["a photo of {subject} here", "a photo of {identifier} {class} here",
                                      "a photo of [trigger] {class} here"])
def test_the_identifier_leaves_no_gap(template):
    assert prompts.without_identifier(template, "dog") == "a photo of dog here"


def test_values_are_not_filled_in_again():
    assert prompts.fill("{identifier}", identifier="{class}", class_noun="dog") == "{class}"


@pytest.mark.parametrize(("template", "message"), [
    ("a {identifer} dog", "unknown placeholder {identifer}"), ("a {} dog", "unknown placeholder {}"),
    ("a { class }", "unknown placeholder { class }"), ("a {{class}}", "unknown placeholder {{class}}"),
    ("a {class", "unknown placeholder {class"), ("a {red|blue} dog", "only JSON's are text, which a quote follows"),
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
    for template in [*SampleConfig().prompts, DataConfig().caption]:
        filled = prompts.fill(template, identifier="sks", class_noun="dog")
        assert "sks dog" in filled
        assert "{" not in filled
    assert prompts.fill(DataConfig().class_caption, class_noun="dog") == "a photo of a dog"
