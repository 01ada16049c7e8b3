"""Stages of a cascade: their own settings, those that all share, and what is said of wrong ones."""

import pytest

from dbtrain.errors import ConfigError
from dbtrain.settings.config import RunConfig
from dbtrain.settings.marks import anchored, deciding
from dbtrain.settings.recipes import load, loads, render
from dbtrain.settings.stages import largest_side, stage_names, upscalers


def cascade(*words):
    return load("tiny", ["stages=['x4_upscaler_lora train.steps=1e2 super.level=3 seed=9', if_stage2_lora]", *words])


def test_a_stage_has_its_own_settings_and_shares_the_runs():
    config = cascade("seed=5", "data.flip=true", "engine.kind=packed", "prior.store=there", "track.every_steps=7")
    first, second = upscalers(config)
    assert stage_names(config) == ["upscaler", "upscaler-2"]
    assert (first.train.steps, first.super.level, first.data.resolution, first.data.crop) == (100, 3, 512, "random")
    assert second.model.family == "if_stage2" and second.lora.targets[0] == "attentions.*.to_q"
    for stage in (first, second):
        assert (stage.seed, stage.data.flip, stage.engine, stage.prior.store) == (5, True, config.engine, "there")
        assert stage.track == config.track and stage.data.caption == config.data.caption and not stage.stages
        assert stage.sample.prompts == config.sample.prompts and stage.sample.steps == 50
    assert largest_side(config) == 512 and largest_side(RunConfig()) == 512


def test_stages_are_written_out_and_read_back():
    config = cascade()
    assert loads(render(config)) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    inline = loads("stages:\n- train: {steps: 1e2}\n- model: {family: x4_upscaler}\n  train: {steps: 7}\n")
    assert [stage.train.steps for stage in inline.stages] == [100, 7]


def test_stages_decide_results_where_there_are_any():
    assert "stages" not in deciding(RunConfig()) and "super" not in deciding(RunConfig())
    told = deciding(cascade())
    assert told["stages"][0]["super"]["level"] == 3 and "engine" not in told["stages"][0]
    assert deciding(cascade("stages=[x4_upscaler_lora]"))["stages"] != told["stages"]


def test_places_of_stages_are_anchored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert anchored(load("tiny", ["stages=['tiny model.path=model']"])).stages[0].model.path == f"{tmp_path}/model"


@pytest.mark.parametrize(
    "stages, message",
    [
        ("[nope]", "no shipped recipe has this name"),
        ("['x4_upscaler_lora train.stepz=3']", "did you mean train.steps?"),
        ("[if_cascade]", "has stages of its own"),
        ("[3]", "got 3, want a recipe's name, or settings"),
        ("['a \"']", "No closing quotation"),
        ("['']", "recipe ''"),
        ("3", "got 3, want a list of text"),
        ("[{train: {steps: 0}}]", "stages[0] of override stages=[{train: {steps: 0}}]: train.steps: got 0"),
        ("[x4_upscaler_full_zero2]", "upscaler: train.method: must be lora"),
        ("['x4_upscaler_lora super.level=5 super.level_highest=2']", "is 2, below super.level = 5"),
    ],
)
def test_wrong_stages_are_explained(stages, message):
    with pytest.raises(ConfigError) as caught:
        load("tiny", [f"stages={stages}", "engine.kind=packed"])
    assert message in str(caught.value) and len(caught.value.findings) == 1
