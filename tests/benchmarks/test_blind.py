"""What a blind judge's answers count for."""

import numpy as np
import pytest

from benchmarks import blind
from dbtrain_embedded import sprites

PROMPTS = [prompt for line in blind.SHEET.splitlines() for prompt in line.split("|")]


@pytest.mark.parametrize("prompt, noun, place, change", [
    ("a photo of a red car on the beach", "car", "beach", ("colour", "red")),
    ("a frog wearing a hat in the snow", "frog", "snow", ("accessory", "hat")),
    ("a pencil sketch of a cat", "cat", "plain", ("style", "sketch")),
    ("a close-up photo of a clock", "clock", "plain", ("view", "close")),
    ("a photo of a sks dog on the beach", "dog", "beach", None),
])  # fmt: skip
def test_a_true_scene_shows_what_the_prompt_asks_for(prompt, noun, place, change):
    facts = blind.facts_of(prompt, np.random.default_rng(0))
    assert (facts.noun, facts.place) == (noun, place) and facts.sprite in sprites.of_noun(noun, "train")
    changes = {key: getattr(facts, key) for key in ("colour", "accessory", "style", "view")}
    assert [pair for pair in changes.items() if pair[1]] == ([change] if change else [])


def test_the_sheet_has_a_true_scene_for_each_prompt_and_another_for_another_noise():
    first, again, other = (
        np.stack([np.asarray(one) for one in blind.true_pictures(PROMPTS, noise)]) for noise in (0, 0, 1)
    )
    assert first.shape == (64, 64, 64, 3) and np.array_equal(first, again)
    assert all(not np.array_equal(one, two) for one, two in zip(first, other, strict=True))
    facts = [blind.facts_of(prompt, np.random.default_rng(0)) for prompt in PROMPTS]
    placed = [any(word in prompt.split() for word in blind.SCENE_WORDS) for prompt in PROMPTS]
    assert [one.place != "plain" for one in facts] == placed


def test_a_class_is_told_by_its_noun_or_another_name_of_it():
    assert blind.told("A kitten's face", "cat")
    assert not blind.told("a pig", "cat")


def test_answers_are_counted_by_class_and_by_scene():
    key = [
        {"prompt": "a dog in the snow", "class": "dog", "scene": "snow"},
        {"prompt": "a car", "class": "car", "scene": None},
        {"prompt": "a cat at night", "class": "cat", "scene": "night"},
    ]
    found = blind.score(key, {"1": ["puppy", "winter"], "2": ["mountain", "plain"]})
    assert found["class named"] == "1 of 3"
    assert found["scene named"] == "1 of 2"
    assert found["missed"] == ["a car: mountain / plain", "a cat at night: "]


def test_a_sample_is_picked_out_by_its_letter():
    key = [{"subject": "x", "letter": "B"}, {"subject": "x", "letter": "A"}, {"subject": "y", "letter": "C"}]
    found = blind.score(key, {"1": "b", "2": "C", "3": "C"})
    assert found == {"picked out": "2 of 3", "by subject": {"x": "1 of 2", "y": "1 of 1"}}
