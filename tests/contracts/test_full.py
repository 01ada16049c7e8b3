"""Contract of training all weights: a step of every ZeRO stage moves what has a gradient, whatever the architecture."""

import math

import pytest

from dbtrain.families import FAMILIES
from tests.kit.main_job import rig, small_config

FULL = ("train.method=full", "train.steps=1", "data.resolution=64", "objective.timesteps=logit_normal", "train.batch=2")


@pytest.mark.parametrize(("name", "stage"), [("qwen_image", 0), ("qwen_image", 2), ("chroma", 3)])
def test_all_weights_take_a_step(name, stage, model_folders):
    """Every parameter of the denoiser trains and moves; those that nothing depends on, as the last block's text in
    Qwen-Image, by weight decay alone."""
    base = (f"model.family={name}", f"model.path={model_folders[name]}", f"engine.zero.stage={stage}")
    with rig(small_config(*FULL, *base, "prior.sampler=auto")) as made:
        before = made.state()["master"]
        (values,) = made.steps(0, 1)
        after = made.state()["master"]
        parameters = made.engine.deepspeed.module.denoiser.named_parameters()
        names = {f"{FAMILIES[name].denoiser}.{path}" for path, _ in parameters}
    assert math.isfinite(values["loss"]) and values["grad_norm"] > 0
    assert after.keys() == names and not [path for path, value in after.items() if value.equal(before[path])]
