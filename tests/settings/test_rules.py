"""Rules about several settings: what does not go together is named."""

import pytest

from dbtrain.settings import recipes
from dbtrain.settings.config import RunConfig
from dbtrain.settings.rules import cross_field_findings


def test_the_defaults_go_together():
    assert cross_field_findings(RunConfig()) == []


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"train": {"warmup_steps": 800}}, ["train.warmup_steps"]),
        ({"train": {"batch": 4, "micro_batch": 3}}, ["train.micro_batch"]),
        ({"engine": {"zero": {"offload_optimizer": True}}}, ["engine.zero.offload_optimizer"]),
        ({"engine": {"kind": "zero", "channels_last": True}}, ["engine.channels_last"]),
        ({"engine": {"kind": "zero", "capture": "graph"}}, ["engine.capture"]),
        ({"engine": {"channels_last": True, "capture": "graph"}}, []),
        ({"prior": {"images": 0}}, ["prior.images"]),
        ({"data": {"caption": "a photo of {class}"}}, ["data.caption"]),
        ({"data": {"caption": "{subject}"}}, []),
        ({"data": {"caption": "[trigger] {class}", "class_caption": "a [trigger]"}}, ["data.class_caption"]),
        ({"engine": {"kind": "packed"}, "train": {"method": "full"}}, ["train.method"]),
        ({"engine": {"kind": "packed"}, "track": {"wandb": "x"}}, ["track.wandb"]),
        ({"engine": {"kind": "packed"}, "data": {"buckets": True}}, ["data.buckets"]),
        ({"data": {"buckets": True}, "train": {"batch": 4, "micro_batch": 2}}, []),
        ({"engine": {"kind": "packed"}, "train": {"stop_loss": 0.1, "stop": {"metric": "loss"}}}, ["train.stop_loss"]),
        ({"train": {"steps": 9, "stop": {"metric": "loss"}}}, ["train.stop.every"]),
        ({"train": {"steps": 9}}, []),
        ({"train": {"optimizer": "adamw8bit"}}, ["train.optimizer"]),
        ({"train": {"optimizer": "adamw8bit", "method": "full"}}, []),
        ({"engine": {"kind": "packed", "zero": {"stage": 1}, "deepspeed": "x"}}, ["engine.zero", "engine.deepspeed"]),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, keys):
    findings = cross_field_findings(RunConfig.model_validate(settings))
    assert [key for key, _ in findings] == keys
    assert set(keys) <= recipes.known_keys().keys()
