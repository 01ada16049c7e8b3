"""Stages of a cascade: a base that draws, and then those that enlarge, for the same subjects.

`RunConfig` itself is the first stage. Each of `stages` is an ordinary training in a folder of its own under the
subject's.
"""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from dbtrain.errors import ConfigError, shown
from dbtrain.settings.config import RunConfig, StageConfig

OF_ALL = ("seed", "identifier", "engine", "checkpoint", "publish", "track")
"""Groups of settings that all stages share."""
OWN_DATA = ("resolution", "crop", "caption_dropout", "cache_latents", "cache_text")
"""Settings of `data` that are a stage's own; photos, masks and captions are shared."""


def upscalers(config: RunConfig) -> list[RunConfig]:
    """The settings of the stages that enlarge, in order: their own, with those that all stages share. Its samples are
    those of the first, but for a stage with `sample.images=0`, which draws none of its own."""
    found = []
    for stage in config.stages:
        data = config.data.model_copy(update={name: getattr(stage.data, name) for name in OWN_DATA})
        prior = stage.prior.model_copy(update={"store": config.prior.store})
        shown = {name: getattr(config.sample, name) for name in ("every_steps", "prompts", "images", "seed")}
        sample = stage.sample.model_copy(update=shown if stage.sample.images else {**shown, "images": 0})
        shared = {name: getattr(config, name) for name in OF_ALL}
        whole = {name: getattr(stage, name) for name in type(stage).model_fields}
        found.append(RunConfig(**{**whole, **shared, "data": data, "prior": prior, "sample": sample}))
    return found


def stage_names(config: RunConfig) -> list[str]:
    """Folders of the stages that enlarge, under a subject's: `upscaler`, `upscaler-2` and so on."""
    return ["upscaler" if number == 0 else f"upscaler-{number + 1}" for number in range(len(config.stages))]


def read_stages(
    given: Sequence[Any],
    load: Callable[[str, Sequence[str]], RunConfig],
    check: Callable[[str, dict[str, Any]], RunConfig],
) -> tuple[tuple[StageConfig, ...], list[str]]:
    """(the settings of stages as a file or a command line gives them, what is wrong with them).

    load(recipe, overrides) and check(place, tree) make settings of a stage in words, and of one in settings.
    """
    stages, problems = [], []
    for number, item in enumerate(given):
        try:
            if isinstance(item, str):
                recipe, *overrides = shlex.split(item) or [""]
                config = load(recipe, overrides)
            elif isinstance(item, dict):
                config = check(f"stages[{number}]", item)
            else:
                raise ConfigError(f"got {shown(item)}, want a recipe's name, or settings")
            if config.stages:
                raise ConfigError("has stages of its own; name them here one after another")
            stages.append(StageConfig(**{name: getattr(config, name) for name in StageConfig.model_fields}))
        except (ConfigError, ValueError) as error:
            lines = error.findings if isinstance(error, ConfigError) else [str(error)]
            problems += [f"[{number}] {line}" for line in lines]
    return tuple(stages), problems


def largest_side(config: RunConfig) -> int:
    """`data.resolution` of the stage with the largest pictures, at which photos are stored for all."""
    return max(config.data.resolution, *(stage.data.resolution for stage in config.stages), 0)
