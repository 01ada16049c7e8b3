"""YAML 1.2: scalars by the core schema, no anchors, bounded depth, and what is written is read back."""

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtrain.settings import yaml12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("+.INF", math.inf),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("True", True),
        ("~", None),
        ("Null", None),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-3", -3),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("=", "="),
        ("'1'", "1"),
        ("e5", "e5"),
    ],
)
def test_scalars_are_yaml_1_2(text, value):
    node = yaml12.read_node(text)
    found = yaml12.SCALARS[node.tag.removeprefix(yaml12.CORE)](node.value)
    assert found == value
    assert type(found) is type(value)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    )
)
def test_plain_data_survives_writing_and_reading(value):
    def read(node):
        if hasattr(node.value, "append"):
            return [read(item) for item in node.value]
        return yaml12.SCALARS[node.tag.removeprefix(yaml12.CORE)](node.value)

    assert read(yaml12.read_node(yaml12.dump(value))) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &x 1\nb: *x\n", "anchors and aliases"),
        ("[" * 17 + "]" * 17, "nested more than 16 deep"),
        ("a: [1", "expected ',' or ']'"),
    ],
)
def test_what_is_refused_is_explained_with_its_line(text, problem):
    with pytest.raises(yaml.YAMLError) as caught:
        yaml12.read_node(text)
    line, words = yaml12.explain_error(caught.value)
    assert line == 1 and problem in words


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "? [a]\n: 1\n", "a: !!python/name:os.system x\n", "a: !!int x\n"])
def test_values_that_are_not_plain_are_refused(text):
    with pytest.raises(yaml.YAMLError):
        yaml12.read(text)


def test_plain_values_are_read():
    assert yaml12.read("a: [1, on, 1e-4, ~]\nb: {c: 'x'}\n") == {"a": [1, "on", 1e-4, None], "b": {"c": "x"}}
    assert yaml12.read("# nothing\n") is None
