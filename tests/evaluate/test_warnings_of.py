"""The warnings' rules, each at its border, and what counts as a copy."""

import pytest
import torch

from dbtrain.evaluate.intervals import Interval
from dbtrain.evaluate.scores import SubjectFeatures
from dbtrain.evaluate.warnings_of import COPY_SHARE, copied, warnings_of

GOOD = {
    "scores": {"dino": 0.7, "prompt_gap": 0.30, "pres": 0.30},
    "base": {"dino": 0.3, "prompt_gap": 0.40, "pres": 0.25},
    "real": {"dino": 0.8},
}


def kinds(copies=0.0, **changes):
    """The warnings of a good subject with `row__score=value` changes; every interval is 0.02 wide."""
    rows = {name: dict(row) for name, row in GOOD.items()}
    for name, value in changes.items():
        row, score = name.split("__")
        rows[row][score] = value
    scores = {
        row: {name: Interval(value, value - 0.01, value + 0.01, 9) for name, value in cells.items()}
        for row, cells in rows.items()
    }
    return [(warned.kind, warned.text) for warned in warnings_of(scores, copies)]


def test_a_good_subject_has_no_warning():
    assert kinds() == []


@pytest.mark.parametrize(
    "changes, kind, text",
    [
        ({"scores__dino": 0.81}, "overfit", "more (0.810) than the photos resemble each other (0.800)"),
        ({"scores__prompt_gap": 0.19}, "overfit", "prompts have little effect: 48% of the base model's, want 50%"),
        ({"copies": COPY_SHARE}, "overfit", "10% of the generated images are near copies"),
        # (0.55 - 0.25) / (0.8 - 0.25) = 0.545
        ({"scores__pres": 0.55}, "drift", "it has gone 55% of the way to the photos (PRES 0.550, before tuning 0.250)"),
    ],
)
def test_each_rule_says_what_it_saw(changes, kind, text):
    found = kinds(**changes)
    assert [one[0] for one in found] == [kind]
    assert text in found[0][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"scores__dino": 0.8},
        {"scores__prompt_gap": 0.2},
        {"copies": COPY_SHARE - 0.01},
        {"scores__pres": 0.52},
        # Nothing is said where the base itself has no effect of prompts, or is already as near as the photos.
        {"base__prompt_gap": 0.005, "scores__prompt_gap": 0.0},
        {"base__pres": 0.8, "scores__pres": 0.9},
        # Three quarters of a gap that is as small as the intervals are wide.
        {"base__pres": 0.78, "scores__pres": 0.795},
    ],
)
def test_the_borders(changes):
    assert kinds(**changes) == []


def test_without_a_base_row_nothing_is_compared():
    rows = {"scores": {"pres": Interval(0.9, 0.8, 1.0, 4)}, "base": {}, "real": {}}
    assert warnings_of(rows, 0.0) == []


def test_a_copy_is_alike_and_nearer_than_the_photos_are_to_each_other():
    photos, drawn = (
        torch.eye(3)[:2],
        torch.tensor([[1.0, 0.01, 0.0], [0.0, 0.0, 1.0], [0.01, 1.0, 0.0], [1.0, 0.0, 0.1]]),
    )
    alike = torch.tensor([[0.99, 0.0], [0.99, 0.99], [0.5, 0.0], [0.0, 0.99]])
    s = SubjectFeatures(real_identity_MD=photos, generated_identity_ND=drawn)
    assert copied(s, alike) == 0.25
    assert copied(SubjectFeatures(real_identity_MD=photos[:1], generated_identity_ND=drawn), alike[:, :1]) == 0.0
