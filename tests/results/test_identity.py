"""How a training that is wanted relates to one that was made, and what a refusal names."""

import pytest

from dbtrain.results.identity import Identity, Relation, difference, digest_of, relation


def identity(photos=("a", "b"), caption=None, **settings):
    """Of a training by these settings of `train`."""
    train = {"steps": 4, "lr": 0.001, "schedule": "constant", **settings}
    about = {"settings": {"seed": 0, "train": train}, "caption": caption, "data": "".join(photos), "photos": [*photos]}
    return Identity(digest_of(about), about)


@pytest.mark.parametrize(
    "wanted, how",
    [
        (identity(), Relation.SAME),
        (identity(steps=5), Relation.LONGER),
        (identity(steps=3), Relation.OTHER),
        (identity("abc"), Relation.JOINED),
        (identity("cab"), Relation.JOINED),
        (identity("abc", steps=9), Relation.JOINED),
        (identity("abc", steps=3), Relation.OTHER),
        (identity("a"), Relation.OTHER),
        (identity("ac"), Relation.OTHER),
        (identity(lr=0.1), Relation.OTHER),
        (identity(lr=0.1, steps=5), Relation.OTHER),
        (identity("abc", caption="x"), Relation.OTHER),
    ],
)
def test_more_steps_and_more_photos_are_the_same_training_and_nothing_else_is(wanted, how):
    assert relation(identity(), wanted) is how


def test_a_refusal_names_what_differs_old_and_new():
    told = difference(identity(), identity("ac", "a {identifier}", lr=0.01))
    assert told == "caption was not set, is 'a {identifier}'; the photos differ; train.lr was 0.001, is 0.01"


def test_a_setting_of_a_newer_version_is_named_too():
    assert difference(identity(), identity(precision="fp16")) == "train.precision was not set, is 'fp16'"


def test_files_of_old_or_with_other_words_than_their_digest_say_the_digest_alone():
    made = identity()
    for about in (None, [], {}, {**made.about, "caption": "y"}):
        found = Identity.read(made.run, about)
        assert not found.about and relation(found, made) is Relation.SAME
        assert relation(found, identity(steps=5)) is Relation.OTHER
        assert made.run[:12] in difference(found, identity(steps=5))
    assert Identity.read(made.run, made.about) == made
