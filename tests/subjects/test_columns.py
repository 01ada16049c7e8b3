"""The table of a manifest's columns: every row fits the settings and the subject; cells of each kind."""

from dataclasses import fields
from decimal import Decimal
from pathlib import Path

import pytest

from dbtrain.settings.config import RunConfig
from dbtrain.settings.recipes import known_keys
from dbtrain.subjects.columns import COLUMNS
from dbtrain.subjects.finding import CellError
from dbtrain.values import Subject

HERE = Path()


def test_every_column_has_a_field_and_its_setting_exists():
    assert [column.field for column in COLUMNS.values()] == [field.name for field in fields(Subject)]
    settings = {name: column.setting for name, column in COLUMNS.items() if column.setting}
    assert settings == {
        "seed": "seed",
        "steps": "train.steps",
        "lr": "train.lr",
        "rank": "lora.rank",
        "prior_weight": "prior.weight",
    }
    assert set(settings.values()) <= known_keys().keys()


@pytest.mark.parametrize(
    ("name", "cell", "value"),
    [
        ("steps", "20", 20),
        ("steps", 20.0, 20),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("rank", "1024", 1024),
        ("lr", "1e-4", 1e-4),
        ("lr", Decimal("0.1"), 0.1),
        ("prior_weight", 3, 3.0),
        ("subject", 7, "7"),
        ("class", " house cat ", "house cat"),
        ("caption", "[trigger] {class}, {subject}", "[trigger] {class}, {subject}"),
        ("captions", ["a {subject}", None, ""], ("a {subject}", "", "")),
        ("captions", {"1.jpg": " a dog "}, {"1.jpg": "a dog"}),
        ("steps", "42.0", 42),
        ("seed", "9223372036854775807.0", 2**63 - 1),
        ("rank", "1.6e1", 16),
    ],
)
def test_sound_cells_have_these_values(name, cell, value):
    found = COLUMNS[name].check(cell, HERE)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("steps", True),
        ("steps", 1.5),
        ("steps", "1.5"),
        ("steps", 10**9),
        ("seed", float("inf")),
        ("rank", 1025),
        ("lr", True),
        ("lr", [1]),
        ("prior_weight", 0),
        ("prior_weight", "inf"),
        ("prior_weight", 10**400),
        ("prior_weight", True),
        ("subject", 1.5),
        ("class", None),
        ("caption", "{{a}} {identifier}"),
        ("captions", "a text"),
        ("captions", [["nested"]]),
        ("captions", ["{who}"]),
        ("steps", "42.5"),
        ("steps", "nan"),
        ("steps", "1e999999999"),
        ("seed", "1e-999999999"),
        ("lr", "0,0001"),
    ],
)
def test_other_cells_are_refused_with_what_is_wanted(name, cell):
    with pytest.raises(CellError) as caught:
        COLUMNS[name].check(cell, HERE)
    assert len(caught.value.args) == 3 and all(caught.value.args)


def test_what_settings_cannot_give_is_known_to_the_column():
    full = RunConfig.model_validate(
        {"train": {"method": "full", "warmup_steps": 5}, "prior": {"images": 0, "weight": 0}}
    )
    for name, value, part in (("steps", 5, "train.warmup_steps is 5"), ("rank", 4, "no effect"),
                              ("prior_weight", 0.5, "prior.images is 0")):  # fmt: skip
        (conflict,) = COLUMNS[name].conflicts(value, full)
        assert part in conflict[0] and conflict[1]
        assert list(COLUMNS[name].conflicts(value, RunConfig())) == []
    assert list(COLUMNS["lr"].conflicts(0.5, full)) == []
