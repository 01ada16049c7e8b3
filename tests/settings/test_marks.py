"""Annotations of settings: which decide nothing that is learnt, which name places, which name rows of tables."""

import hashlib
import json
from typing import Annotated

import pytest
from pydantic import ValidationError

from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.objective import DISTRIBUTIONS, WEIGHTINGS
from dbtrain.settings.config import RunConfig, Section
from dbtrain.settings.marks import OneOf, absolute, absolute_name, anchored, deciding, without_result
from dbtrain.settings.recipes import known_keys, load, loads

OLDER = (
    "train.steps=250", "train.lr=2e-3", "train.schedule=constant", "train.batch=4", "objective.timesteps=uniform",
    "train.text_encoder=false", "train.text_encoder_lr=null", "lora.rank=16", "prior.weight=1",
    "lora.targets=[attn*.to_q,attn*.to_k,attn*.to_v,attn*.to_out.0]",
)  # fmt: skip
"""`tiny` as it was."""

# Of runs made before the marks were there: such a run goes on only under the same digest.
DIGESTS = {
    None: "677ba19162e6071d05232dd088b81b083cf750acded00174c869573532cf77bb",
    "tiny": "8307fb8f847599f5756cfe363ac89cfb4c7e5f54d4d3009315f3de7556b99c01",
}


@pytest.mark.parametrize("recipe", DIGESTS)
def test_the_digest_of_earlier_runs_holds(recipe):
    plain = json.dumps(deciding(load(recipe, OLDER if recipe else ())), sort_keys=True)
    assert hashlib.sha256(plain.encode()).hexdigest() == DIGESTS[recipe]


def test_the_settings_without_a_result_are_these():
    sections = dict.fromkeys(("engine", "checkpoint", "sample", "publish", "track"), True)
    keys = {
        "model": ("path", "revision", "variant", "single_file_layout", "distilled", "attention"),
        "data": ("mask", "max_pixels", "cache_latents", "cache_text", "shards", "schemes"),
        "train": ("micro_batch", "gradient_checkpointing"),
        "prior": ("store", "batch"),
        "identifier": ("registry",),
        "lora": ("init",),
    }
    at_default = {"model": ("dtype", "quantize"), "objective": ("shift",), "lora": ("up_ratio",),
                  "data": ("mask_floor", "srgb", "caption_dropout", "buckets"),
                  "train": ("stop", "optimizer")}  # fmt: skip
    other = ["model.dtype=bf16", "objective.shift=3", "data.mask_floor=0", "data.srgb=false"]
    other += ["model.quantize=int8", "engine.kind=packed", "lora.up_ratio=2", "super.level=5", "train.stop.metric=loss"]
    told = loads("", "x", [*other, "data.caption_dropout=0.1"]).replaced("data.buckets", True)
    told = told.replaced("train.optimizer", "adamw8bit")
    sections |= {"stages": True}
    assert without_result(told) == {**sections, **{name: dict.fromkeys(own, True) for name, own in keys.items()}}
    both = {name: (*keys.get(name, ()), *at_default.get(name, ())) for name in {**keys, **at_default}}
    plain = {**sections, "super": True, **{name: dict.fromkeys(own, True) for name, own in both.items()}}
    assert without_result(RunConfig()) == plain


def test_every_place_is_anchored_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    places = ["model.path", "model.single_file_layout", "data.shards", "prior.store", "identifier.registry",
              "engine.deepspeed"]  # fmt: skip
    relative = loads("", "x", [f"{key}=model" for key in places])
    assert anchored(relative) == loads("", "x", [f"{key}={tmp_path}/model" for key in places])
    assert anchored(RunConfig()) == RunConfig()


def test_addresses_hub_ids_and_absent_values_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (absolute("s3://bucket/shards"), absolute(None)) == ("s3://bucket/shards", None)
    assert absolute("new") == str(tmp_path / "new")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    assert absolute("~/new") == str(tmp_path / "new")
    assert (absolute_name("~/base"), absolute_name("~/none")) == (str(tmp_path / "base"), "~/none")
    (tmp_path / "embedded").mkdir()
    names = ["embedded", "someone/a-model", None]
    assert [absolute_name(name) for name in names] == names
    (tmp_path / "someone" / "a-model").mkdir(parents=True)
    assert absolute_name("someone/a-model") == str(tmp_path / "someone" / "a-model")


@pytest.mark.parametrize(
    "key, table",
    [
        ("model.family", ("auto", *FAMILIES)),
        ("objective.weighting", WEIGHTINGS),
        ("objective.timesteps", DISTRIBUTIONS),
    ],
)
def test_names_of_tables_are_the_choices(key, table):
    assert known_keys()[key]["enum"] == list(table)
    for name in table:
        assert load(overrides=[f"{key}={name}"])
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=f"{key}: got 'nobody', want one of {', '.join(table)}$"):
        loads(f"{section}: {{{name}: nobody}}")


def test_a_new_row_of_a_table_is_a_new_choice():
    class Small(Section):
        color: Annotated[str, OneOf({"red": "paint:red", "blue": "paint:blue"})] = "red"

    assert Small(color="blue").color == "blue"
    with pytest.raises(ValidationError, match="Input should be 'red' or 'blue'"):
        Small(color="green")
