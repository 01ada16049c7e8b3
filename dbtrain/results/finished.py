"""Finished subjects used again: their pipelines and more pictures, many adapters over one loaded base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dbtrain.data.images import open_photo, square
from dbtrain.errors import ConfigError, DataError
from dbtrain.families import FAMILIES
from dbtrain.models.adapters import adapter, put_on
from dbtrain.models.family import Family, Models, low_side
from dbtrain.models.load import load_models
from dbtrain.models.sampling import Chain, draw_samples, make_enlarger, make_pipeline, sampling_mode
from dbtrain.results.card import CONFIG_FILE
from dbtrain.results.publish import LORA_FILE, MODEL_FOLDER, read_lora
from dbtrain.results.record import finished_record
from dbtrain.results.sheets import publish_sheet
from dbtrain.settings.config import ModelConfig, RunConfig
from dbtrain.settings.recipes import load
from dbtrain.settings.stages import stage_names, upscalers
from dbtrain.subjects.prompts import application, fill, read_set

SHEET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""What a sheet's name looks like. The name becomes that of a file and of a folder."""


@contextmanager
def finished_pipeline(
    folder: Path | None,
    family: Family,
    models: Models,
    config: RunConfig,
    weight: float = 1.0,
    pictures: Sequence[Path] = (),
) -> Iterator[Any]:
    """The pipeline of a finished subject: the base with its adapter, or its own model, and the stages that enlarge.
    None gives the plain bases'.

    weight: how much of the first stage's adapter is added to the base; 0 is the base alone. pictures: what a base that
    enlarges is given where no stage draws before it. Raises ConfigError for another weight
    than 1 where there is no adapter.
    """
    with finished_models(folder, family, models, config, weight) as own:
        if family.guide is None:
            first: Any = make_pipeline(family, own)
        elif pictures:
            first = [Image.fromarray(square(open_photo(path), low_side(config))) for path in pictures]
        else:
            raise ConfigError(
                f"{folder or family.name}: enlarges pictures and draws none; give some with --picture, or train it as "
                "a stage of a base"
            )
        if family.guide is not None:
            first = Chain(first, (make_enlarger(family, own, config),))
        with chained(first, [folder], models, config) as pipeline:
            yield pipeline


@contextmanager
def finished_models(
    folder: Path | None, family: Family, models: Models, config: RunConfig, weight: float = 1.0
) -> Iterator[Models]:
    """The models of a finished subject: the base with its adapter, or its own; see `finished_pipeline`."""
    with sampling_mode(models):
        if folder is None:
            yield models
        elif has_adapter(folder):
            with adapter(family, models, read_lora(folder)[0].folded(weight)):
                yield models
        elif weight != 1:
            raise ConfigError(f"--weight: {folder} is a whole model and has no adapter to weigh; leave it out")
        else:
            own = config.model.model_copy(update={"path": str(folder / MODEL_FOLDER)})
            yield load_models(family, own).to(models.denoiser.device)


@contextmanager
def chained(
    first: Any, folders: Sequence[Path | None], models: Models, config: RunConfig, rows: Sequence[int] | None = None
) -> Iterator[Any]:
    """A pipeline, followed by a subject's stages that enlarge, if its settings have any; None takes their plain bases.

    models: those of the first stage, which hold the others'. rows: those of several subjects in the stack of adapters
    on the first stage; the adapters of each further stage are then put on it as a stack, too.
    """
    if not config.stages:
        yield first
        return
    with ExitStack() as ends:
        then = []
        for name, settings, base in zip(stage_names(config), upscalers(config), models.upscalers):
            family, places = FAMILIES[settings.model.family], [folder and folder / name for folder in folders]
            if rows is None:
                own, place_of = ends.enter_context(finished_models(places[0], family, base, settings)), None
            else:
                ends.enter_context(sampling_mode(base))
                given = [read_lora(place)[0].folded() for place in places if place]
                ends.enter_context(adapter(family, base, *given))
                own, place_of = base, {row: place for place, row in enumerate(rows)}
            then.append(make_enlarger(family, own, settings)._replace(row_of=place_of))
        yield Chain(first, tuple(then))


def load_all(config: RunConfig) -> Models:
    """The base model of some settings, and those of its further stages, on this machine's device."""
    models = load_models(FAMILIES[config.model.family], config.model)
    models.upscalers = tuple(
        load_models(FAMILIES[stage.model.family], stage.model) for stage in upscalers(config)
    )
    return models.to(own_device())


def own_pipeline(folder: Path, weight: float = 1.0) -> Any:
    """A finished subject's pipeline with models of its own, on this machine's device; weight as in `finished_pipeline`.

    Raises DataError for a folder that holds no finished subject.
    """
    finished_record(folder)
    config = finished_config(folder, ())
    family, whole = FAMILIES[config.model.family], not has_adapter(folder)
    if whole and weight != 1:
        raise ConfigError(f"weight: {folder} is a whole model and has no adapter to weigh; leave it out")
    own = config.model.model_copy(update={"path": str(folder / MODEL_FOLDER)}) if whole else config.model
    models = load_models(family, own).to(own_device())
    if not whole:
        put_on(family, models, read_lora(folder)[0].folded(weight))
    for module in (models.denoiser, *models.text_encoders.values()):
        module.eval()
    return make_pipeline(family, models)


@contextmanager
def stacked_pipeline(folders: Sequence[Path], family: Family, models: Models) -> Iterator[Any]:
    """The base's pipeline with the adapters of several finished subjects as the rows of one stack, in order; see
    `models.sampling.generate`. Each folder must hold an adapter."""
    own = [read_lora(folder)[0].folded() for folder in folders]
    with sampling_mode(models), adapter(family, models, *own, folds=True):
        yield make_pipeline(family, models)


def has_adapter(folder: Path) -> bool:
    """Whether a finished subject is an adapter, and not a whole model."""
    return (folder / LORA_FILE).exists()


def own_device() -> torch.device:
    """The device on which this machine draws and scores."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class WarmBase:
    """The base model that was loaded last, kept on this machine's device for the next subject of the same base."""

    of: list[ModelConfig] = field(default_factory=list)
    models: Models | None = None

    def load(self, config: RunConfig) -> Models:
        """The base model of a configuration, and those of its further stages."""
        wanted = [config.model, *(stage.model for stage in config.stages)]
        if self.models is None or self.of != wanted:
            self.models = None  # two bases at once may not fit
            self.models = load_all(config)
            self.of = wanted
        return self.models


def generate_finished(
    folders: Sequence[Path],
    prompts: Sequence[str] | None,
    overrides: Sequence[str],
    name: str,
    sets: Sequence[str] = (),
    negative: str | None = None,
    weight: float = 1.0,
    pictures: Sequence[Path] = (),
) -> Iterator[Path]:
    """The sheets drawn for each finished subject's folder. A base is loaded once for all adapters that follow on it.

    prompts: templates with `{subject}`; None takes those of the subject's own recipe. sets: names of prompt sets, in
    place of prompts; each set gives one sheet of its name. overrides: `a.b=c` settings. negative: a template of what
    the pictures are to keep away from. weight, pictures: as in `finished_pipeline`.
    Raises DataError for a folder without a finished subject, and ConfigError for an unknown set, for a bad name of a
    sheet, and where there is nothing to draw.
    """
    warm = WarmBase()
    titles = sheet_titles(sets) if sets else {name: ""}
    refuse_titles([*titles])
    for prompt_set in sets:
        read_set(prompt_set)
    for folder in folders:
        record, config = finished_record(folder), finished_config(folder, overrides)
        noun, family = record["class"], FAMILIES[config.model.family]
        sheets = {
            title: application(prompt_set, noun) if sets else tuple(prompts or config.sample.prompts)
            for title, prompt_set in titles.items()
        }
        refuse_nothing(folder, sheets, config)
        if negative and not family.negative:
            raise ConfigError(f"--negative: the pipeline of {family.name} takes no negative prompt; leave it out")
        avoided = negative and fill(negative, identifier=record["identifier"], class_noun=noun)
        with finished_pipeline(folder, family, warm.load(config), config, weight, pictures) as pipeline:
            for title, templates in sheets.items():
                texts = [fill(text, identifier=record["identifier"], class_noun=noun) for text in templates]
                chosen = (config.sample, config.data.resolution, config.train.precision)
                rows = draw_samples(pipeline, texts, *chosen, negative=avoided)
                yield publish_sheet(folder, rows, texts, title)


def sheet_titles(sets: Sequence[str]) -> dict[str, str]:
    """Prompt sets by the name of their sheet. Raises ConfigError where two sets have the same name of a sheet."""
    titles = {Path(name).stem: name for name in sets}
    for name in sets:
        sheet = Path(name).stem
        if titles[sheet] != name:
            raise ConfigError(f"--set: {name} and {titles[sheet]} would both be the sheet {sheet}.png; rename the file")
    return titles


def refuse_titles(titles: Sequence[str]) -> None:
    """Raise ConfigError for names of the sheets that training writes, and for those that are no file names."""
    for title in titles:
        if not SHEET.fullmatch(title):
            raise ConfigError(f"--name, --set: {title!r} is no name of a sheet; use letters, digits, _ and -")
        if title == "samples" or title.startswith("step-"):
            raise ConfigError(f"--name, --set: {title!r} is the name of a sheet of the training; choose another")


def refuse_nothing(folder: Path, sheets: Mapping[str, Sequence[str]], config: RunConfig) -> None:
    """Raise ConfigError where no prompt or no image is asked for."""
    if not config.sample.images:
        raise ConfigError(f"{folder}: sample.images is 0 there, and nothing would be drawn; add sample.images=4")
    for title, templates in sheets.items():
        if not templates:
            raise ConfigError(f"{folder}: {title} has no prompt for this subject; give --prompt, or another --set")


def finished_config(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The settings that a subject was trained with, with overrides."""
    if not (folder / CONFIG_FILE).exists():
        raise DataError(f"{folder}: has no {CONFIG_FILE}; give a folder under OUT/subjects/")
    return load(folder / CONFIG_FILE, overrides)
