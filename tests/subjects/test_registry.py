"""Identifiers at scale and over time: no two alike, and nobody's changes when others come."""

import json
import multiprocessing
import time

import pytest

from dbtrain.errors import ConfigError, DataError
from dbtrain.models.load import load_tokenizer
from dbtrain.subjects.identifiers import allocate
from dbtrain.subjects.registry import read_registry, recorded_identifiers, vocabulary_digest
from dbtrain.values import Subject
from tests.subjects.test_identifiers import clip_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


def people(*numbers, **fields):
    return [Subject(f"s{number}", "dog", (), **fields) for number in numbers]


def test_twenty_thousand_subjects_are_named_apart_and_again_the_same(tmp_path, tokenizer):
    subjects = people(*range(20_000))
    begin = time.process_time()
    names = recorded_identifiers(tmp_path / "r", tokenizer, subjects)
    took_s = time.process_time() - begin
    assert len({name.casefold() for name in names.values()}) == 20_000
    assert recorded_identifiers(tmp_path / "r", tokenizer, subjects) == names
    assert took_s < 30  # 3 s on an idle core


def test_the_order_of_subjects_changes_no_name(tokenizer):
    assert allocate(tokenizer, people(*range(2000))) == allocate(tokenizer, people(*range(2000))[::-1])


def test_later_subjects_change_nobody(tmp_path, tokenizer):
    """Without a registry they do, or this would show nothing."""
    early, all_of_them = people(*range(0, 400, 2)), people(*range(400))
    first = recorded_identifiers(tmp_path / "r", tokenizer, early)
    grown = recorded_identifiers(tmp_path / "r", tokenizer, all_of_them)
    assert {name: grown[name] for name in first} == first
    assert len({name.casefold() for name in grown.values()}) == 400
    alone = allocate(tokenizer, all_of_them)
    assert any(alone[name] != first[name] for name in first)
    assert recorded_identifiers(tmp_path / "r", tokenizer, early, seed=5, tokens=2) == first


def name_some(registry, first):
    recorded_identifiers(registry, load_tokenizer("embedded"), people(*range(first, first + 60)))


def test_runs_that_share_a_registry_at_once_never_share_an_identifier(tmp_path, tokenizer):
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=name_some, args=(tmp_path / "r", first)) for first in (0, 30, 60)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
        assert run.exitcode == 0
    known = read_registry(tmp_path / "r", vocabulary_digest(tokenizer))
    assert known.keys() == {f"s{number}" for number in range(120)}
    assert len(set(known.values())) == 120


def test_an_identifier_asked_for_must_be_free(tmp_path, tokenizer):
    given = recorded_identifiers(tmp_path / "r", tokenizer, people(1))["s1"]
    with pytest.raises(ConfigError, match="subject s2: identifier .* was given to subject s1; choose another"):
        recorded_identifiers(tmp_path / "r", tokenizer, people(2, identifier=given.upper()))
    own = recorded_identifiers(tmp_path / "r", tokenizer, people(2, identifier="sks"))
    assert own == {"s2": "sks"} == recorded_identifiers(tmp_path / "r", tokenizer, people(2))
    assert recorded_identifiers(tmp_path / "r", tokenizer, people(1, identifier="xqz")) == {"s1": "xqz"}


def test_an_identifier_given_to_a_neighbour_is_refused_and_one_that_both_ask_for_is_shared(tmp_path, tokenizer):
    """All in one manifest, which grows: the first subject's name was given to it, so that it is not free."""
    given = recorded_identifiers(tmp_path / "r", tokenizer, people(1))["s1"]
    for wanted in (given, given.upper()):
        with pytest.raises(ConfigError, match="subject s2: identifier .* was given to subject s1; choose another"):
            recorded_identifiers(tmp_path / "r", tokenizer, [*people(1), *people(2, identifier=wanted)])
        assert read_registry(tmp_path / "r", vocabulary_digest(tokenizer)) == {"s1": given}
    shared = recorded_identifiers(tmp_path / "r", tokenizer, people(1, 2, identifier=given))
    assert shared == {"s1": given, "s2": given}
    # Who has it keeps it, though the other no longer asks and a third comes.
    later = recorded_identifiers(tmp_path / "r", tokenizer, [*people(1, identifier=given), *people(2, 3)])
    assert later.pop("s3") != given and later == shared


def test_damage_and_another_vocabulary_are_refused_and_left_alone(tmp_path, tokenizer):
    registry = tmp_path / "r"
    recorded_identifiers(registry, tokenizer, people(1, 2))
    with pytest.raises(ConfigError, match="another vocabulary"):
        recorded_identifiers(registry, clip_tokenizer(), people(1))
    sound = registry.read_bytes()
    assert json.loads(sound.splitlines()[1]) == ["s1", read_registry(registry, vocabulary_digest(tokenizer))["s1"]]
    for bad in (sound[:-1], sound[:40], b"", sound.replace(b'"s1"', b'"s9"')):
        registry.write_bytes(bad)
        with pytest.raises(DataError, match="its digest differs"):
            recorded_identifiers(registry, tokenizer, people(1))
        assert registry.read_bytes() == bad
