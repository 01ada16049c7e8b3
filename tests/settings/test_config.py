"""The tree of settings: frozen, described, and with rules about several fields."""

import pytest
from pydantic import ValidationError

from dbtrain.settings import recipes
from dbtrain.settings.config import RunConfig, cross_field_findings


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


def test_the_defaults_go_together():
    assert list(cross_field_findings(RunConfig())) == []


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"train": {"warmup_steps": 800}}, ["train.warmup_steps"]),
        ({"train": {"batch": 4, "micro_batch": 3}}, ["train.micro_batch"]),
        ({"engine": {"zero": {"offload_optimizer": True}}}, ["engine.zero.offload_optimizer"]),
        ({"engine": {"channels_last": True, "capture": "graph"}}, ["engine.channels_last", "engine.capture"]),
        ({"prior": {"images": 0}}, ["prior.images"]),
        ({"engine": {"kind": "packed"}, "train": {"method": "full"}}, ["train.method"]),
        ({"engine": {"kind": "packed"}, "track": {"wandb": "x"}}, ["track.wandb"]),
        ({"engine": {"kind": "packed", "zero": {"stage": 1}, "deepspeed": "x"}}, ["engine.zero", "engine.deepspeed"]),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, keys):
    findings = list(cross_field_findings(RunConfig.model_validate(settings)))
    assert [key for key, _ in findings] == keys
    assert set(keys) <= recipes.known_keys().keys()
