"""What a base is by its own small files: its family, and whether it was distilled."""

import re
from pathlib import Path

from dbtrain.errors import ConfigError, DataError, first_line, named
from dbtrain.families import FAMILIES
from dbtrain.models.base_check import REFUSED, base_problem, path_problem, read_json
from dbtrain.models.family import is_local
from dbtrain.models.load import index_path, mind_the_network, refuse_base, source_of
from dbtrain.settings.config import ModelConfig, RunConfig, StageConfig
from dbtrain.tiny import NAMED

AUTO = "auto"
FEW_STEPS = re.compile(r"(?<![A-Za-z])(?i:turbo|schnell|lightning|hyper|lcm|tcd|dmd2?|klein(?=-[0-9]b))(?![a-z])")
"""Words in the names of bases that were distilled to a few steps."""
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")


def settled(config: RunConfig) -> RunConfig:
    """The settings with the base's own family for `auto`, once the base's small files say that it can be trained.

    Raises ConfigError in one line where they say that it cannot. A hub id is asked only for `auto`.
    """
    stages = tuple(_settled_stage(stage) for stage in config.stages)
    if stages:
        config = config.replaced("stages", stages)
    model = config.model
    if model.family == AUTO:
        config = config.replaced("model.family", family_of(model))
    source = source_of(model.path)
    if is_local(source) or path_problem(model.path):
        refuse_base(FAMILIES[config.model.family], model)
    if not model.distilled and (why := distilled(source)):
        raise ConfigError(
            f"model.path: {named(model.path)} {why}, so its adapters drift off the subject; train on the base that it "
            "was made of and sample with this one, or set model.distilled=true"
        )
    return config


def _settled_stage(stage: StageConfig) -> StageConfig:
    """A further stage's settings as `settled`."""
    own = settled(RunConfig(**{name: getattr(stage, name) for name in StageConfig.model_fields}))
    return StageConfig(**{name: getattr(own, name) for name in StageConfig.model_fields})


def family_of(config: ModelConfig) -> str:
    """The family whose base lies here. Raises ConfigError where no row of `FAMILIES` is it, with the reason."""
    source = source_of(config.path)
    if config.path not in NAMED and (problem := path_problem(config.path)):
        raise ConfigError(f"model.path: {problem}")
    try:
        if is_local(source):
            problems = {name: base_problem(family, source, config.variant) for name, family in FAMILIES.items()}
        else:
            problems = _of_a_hub_id(source, config)
    except DataError as error:
        raise ConfigError(f"model.path: {error}") from None
    fits = [name for name, problem in problems.items() if problem is None]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ConfigError(f"model.family: auto could be {' or '.join(fits)} for {named(config.path)}; set one of them")
    raise ConfigError(f"model.path: {nearest(problems)}")


def nearest(problems: dict[str, str | None]) -> str:
    """Of why a base is none of each family, the line that says most: what is wrong with it, or what it is."""
    told = [problem for problem in problems.values() if problem]
    best = min(told, key=lambda problem: "model.family=" in problem)
    what = re.match(r"(.*), no base of model\.family=", best)
    return f"{what[1]}; dbtrain has {', '.join(problems)}" if what else best


def _of_a_hub_id(source: str, config: ModelConfig) -> dict[str, str | None]:
    mind_the_network(source)
    try:
        place = index_path(source, config)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.family: auto asks {source} for its model_index.json, and got: {first_line(error)}; set the family"
        ) from error
    index = read_json(place)
    kind = index.get("_class_name")
    if kind in REFUSED:
        return dict.fromkeys(FAMILIES, f"{source} is a {kind}, which dbtrain does not train: {REFUSED[kind]}")
    return {
        name: (problem := family.kind_problem(index)) and f"{source} is {problem}, no base of model.family={name}"
        for name, family in FAMILIES.items()
    }


def distilled(source: str) -> str | None:
    """How it is known that a base was distilled to a few sampling steps; None where nothing says so."""
    name = Path(source).stem if source.endswith(".safetensors") else Path(source).name
    if found := FEW_STEPS.search(name):
        return f"is distilled to a few steps (its name says {found[0]})"
    place = Path(source)
    if not (place / "model_index.json").is_file():
        return None
    index = read_json(place / "model_index.json")
    if index.get("is_distilled"):
        return "is distilled to a few steps (its model_index.json says so)"
    scheduler = (index.get("scheduler") or [None, None])[1]
    if scheduler in FEW_STEP_SCHEDULERS:
        return f"is distilled to a few steps (its scheduler is a {scheduler})"
    if index.get("_class_name") == "FluxPipeline" and _undirected(place):
        return "is distilled to a few steps (FLUX.1 without guidance: schnell)"
    return None


def _undirected(place: Path) -> bool:
    """Whether a FLUX.1 takes no guidance and shifts no noise levels. A de-distilled dev takes none and shifts them."""
    transformer, scheduler = (place / "transformer" / "config.json", place / "scheduler" / "scheduler_config.json")
    dynamic = read_json(scheduler).get("use_dynamic_shifting", False)
    return not (dynamic or read_json(transformer).get("guidance_embeds", False))
