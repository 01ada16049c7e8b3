"""Every shipped recipe and settings file loads."""

import json
from pathlib import Path

import pytest
import yaml

from dbtrain.settings import recipes
from dbtrain.settings.config import RunConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("recipes/*.yaml"))


def test_the_promised_recipes_ship():
    promised = {"tiny", "tiny_full", "sd15_lora", "sd15_full_zero2", "sdxl_lora", "sdxl_full_zero3"}
    assert promised <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_by_name_and_by_path(name):
    by_name = recipes.load(name)
    assert isinstance(by_name, RunConfig)
    assert recipes.load(str(CONFIGS / "recipes" / f"{name}.yaml")) == by_name


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.json")), ids=lambda path: path.name)
def test_a_json_file_parses(path):
    assert json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_a_yaml_file_parses(path):
    assert list(yaml.safe_load_all(path.read_text("utf-8")))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_keeps_its_state_on_the_way(name):
    """Each says how often, with its reason; at least once before the end."""
    config = recipes.load(name)
    assert "checkpoint:" in (CONFIGS / "recipes" / f"{name}.yaml").read_text()
    assert 0 < config.checkpoint.every_steps < config.train.steps
