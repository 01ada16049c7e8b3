"""What a blind judge's answers count for."""

from benchmarks import blind


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
