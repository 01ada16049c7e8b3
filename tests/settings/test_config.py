"""The tree of settings: frozen and described."""

import pytest
from pydantic import ValidationError

from dbtrain.settings import recipes
from dbtrain.settings.config import RunConfig


def test_the_schema_describes_every_setting():
    for key, part in recipes.known_keys().items():
        assert part.get("description"), key


def test_settings_are_frozen_and_unknown_ones_refused():
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().train.steps = 3
    with pytest.raises(ValidationError, match="Extra inputs"):
        RunConfig(stesp=3)


def test_one_value_is_replaced_at_any_depth_and_nothing_else():
    default = RunConfig()
    changed = default.replaced("engine.zero.stage", 2).replaced("seed", 5)
    assert changed == RunConfig.model_validate({"seed": 5, "engine": {"zero": {"stage": 2}}})
    assert default == RunConfig()
