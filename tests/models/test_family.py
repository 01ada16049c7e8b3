"""What a family refuses, and the shift of its noise levels."""

from types import SimpleNamespace

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from dbtrain.errors import ConfigError
from dbtrain.families import FAMILIES
from dbtrain.models.family import noise_shift, refuse_impossible
from dbtrain.settings.recipes import loads

OWN = "prior.sampler=auto"


@pytest.mark.parametrize(
    "words, name",
    [
        ([], "prior.sampler: flux has no euler_ancestral; use one of auto, imported"),
        ([OWN, "train.text_encoder=true"], "train.text_encoder"),
        ([OWN, "model.dtype=bf16"], "model.dtype: is bf16, but train.precision is fp32"),
        ([OWN, "model.dtype=bf16", "train.precision=bf16", "train.method=full"], "model.dtype: .* weights that train"),
        ([OWN, "data.resolution=520"], "data.resolution: is 520, and flux takes multiples of 16"),
    ],
)
def test_what_a_flow_family_cannot_have_is_refused(words, name):
    with pytest.raises(ConfigError, match=name):
        refuse_impossible(FAMILIES["flux"], loads("", "x", ["model.family=flux", *words]))


def test_kohyas_names_are_refused_where_there_are_none():
    words = [OWN, "publish.kohya=true"]
    with pytest.raises(ConfigError, match="publish.kohya: sd3"):
        refuse_impossible(FAMILIES["sd3"], loads("", "x", words))
    refuse_impossible(FAMILIES["flux"], loads("", "x", words))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_can_have_is_not_refused(name):
    if not FAMILIES[name].guide:  # what enlarges draws no class images
        refuse_impossible(FAMILIES[name], loads("", "x", [OWN]))
    refuse_impossible(FAMILIES[name], loads("", "x", ["prior.weight=0"]))


def test_the_shift_is_the_models_or_the_settings():
    models = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    flow = ["objective.timesteps=logit_normal"]
    assert noise_shift(FAMILIES["sd3"], models, loads("", "x", flow)) == 3
    assert noise_shift(FAMILIES["sd3"], models, loads("", "x", [*flow, "objective.shift=1.5"])) == 1.5
    assert noise_shift(FAMILIES["sd"], models, loads("", "x", ["objective.timesteps=stratified"])) == 1
    with pytest.raises(ConfigError, match="stratified"):
        noise_shift(FAMILIES["sd3"], models, loads("", "x", ["objective.timesteps=stratified"]))
