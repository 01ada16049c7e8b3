"""Finished subjects used again: their pipelines and more pictures, many adapters over one loaded base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dbtrain.errors import ConfigError, DataError
from dbtrain.families import FAMILIES
from dbtrain.models.adapters import adapter
from dbtrain.models.family import Family, Models
from dbtrain.models.load import load_models
from dbtrain.models.sampling import draw_samples, make_pipeline, sampling_mode
from dbtrain.results.card import CONFIG_FILE
from dbtrain.results.publish import LORA_FILE, MODEL_FOLDER, read_lora
from dbtrain.results.record import finished_record
from dbtrain.results.sheets import publish_sheet
from dbtrain.settings.config import ModelConfig, RunConfig
from dbtrain.settings.recipes import load
from dbtrain.subjects.prompts import application, fill, read_set

SHEET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""What the name of a sheet looks like; it becomes a file's and a folder's."""


@contextmanager
def finished_pipeline(
    folder: Path | None, family: Family, models: Models, config: RunConfig, weight: float = 1.0
) -> Iterator[Any]:
    """The pipeline of a finished subject: the base with its adapter on it, or its own model; of the base for None.

    weight: how much of the adapter is added to the base; 0 is the base alone. Raises ConfigError for another weight
    than 1 where there is no adapter.
    """
    with sampling_mode(models):
        if folder is None:
            yield make_pipeline(family, models)
        elif (folder / LORA_FILE).exists():
            with adapter(family, models, read_lora(folder)[0].folded(weight)):
                yield make_pipeline(family, models)
        elif weight != 1:
            raise ConfigError(f"--weight: {folder} is a whole model and has no adapter to weigh; leave it out")
        else:
            own = config.model.model_copy(update={"path": str(folder / MODEL_FOLDER)})
            yield make_pipeline(family, load_models(family, own).to(models.denoiser.device))


def own_device() -> torch.device:
    """Where this machine draws and scores."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class WarmBase:
    """The base model that was asked for last, kept on this machine's device for the next subject of the same base."""

    config: ModelConfig | None = None
    models: Models | None = None

    def load(self, config: ModelConfig) -> Models:
        """The base model of a configuration."""
        if self.models is None or self.config != config:
            self.models = None  # two bases at once may not fit
            self.models = load_models(FAMILIES[config.family], config).to(own_device())
            self.config = config
        return self.models


def generate_finished(
    folders: Sequence[Path],
    prompts: Sequence[str] | None,
    overrides: Sequence[str],
    name: str,
    sets: Sequence[str] = (),
    negative: str | None = None,
    weight: float = 1.0,
) -> Iterator[Path]:
    """The sheets drawn for each finished subject folder; adapters of one base share it, loaded once.

    prompts: templates with `{subject}`; None are those of the subject's own recipe. sets: names of prompt sets, each a
    sheet of its own name, in place of prompts. overrides: `a.b=c` settings. negative: a template of what the pictures
    are to keep away from. weight: of the adapters, as in `finished_pipeline`.
    Raises DataError for a folder that holds no finished subject, ConfigError for an unknown set, names that are no
    names of a sheet, and where there is nothing to draw.
    """
    warm = WarmBase()
    titles = sheet_titles(sets) if sets else {name: ""}
    refuse_titles([*titles])
    for one in sets:
        read_set(one)
    for folder in folders:
        record, config = finished_record(folder), finished_config(folder, overrides)
        noun, family = record["class"], FAMILIES[config.model.family]
        sheets = {
            title: application(one, noun) if sets else tuple(prompts or config.sample.prompts)
            for title, one in titles.items()
        }
        refuse_nothing(folder, sheets, config)
        avoided = negative and fill(negative, identifier=record["identifier"], class_noun=noun)
        with finished_pipeline(folder, family, warm.load(config.model), config, weight) as pipeline:
            for title, templates in sheets.items():
                texts = [fill(one, identifier=record["identifier"], class_noun=noun) for one in templates]
                chosen = (config.sample, config.data.resolution, config.train.precision)
                rows = draw_samples(pipeline, texts, *chosen, negative=avoided)
                yield publish_sheet(folder, rows, texts, title)


def sheet_titles(sets: Sequence[str]) -> dict[str, str]:
    """Prompt sets by the name of their sheet. Raises ConfigError where two would be drawn over each other."""
    titles = {Path(one).stem: one for one in sets}
    for one in sets:
        if titles[Path(one).stem] != one:
            other = titles[Path(one).stem]
            raise ConfigError(f"--set: {one} and {other} would both be the sheet {Path(one).stem}.png; rename the file")
    return titles


def refuse_titles(titles: Sequence[str]) -> None:
    """Nothing; ConfigError for names under which training keeps its own sheets, and those that are no file names."""
    for title in titles:
        if not SHEET.fullmatch(title):
            raise ConfigError(f"--name, --set: {title!r} is no name of a sheet; use letters, digits, _ and -")
        if title == "samples" or title.startswith("step-"):
            raise ConfigError(f"--name, --set: {title!r} is the name of a sheet of the training; choose another")


def refuse_nothing(folder: Path, sheets: Mapping[str, Sequence[str]], config: RunConfig) -> None:
    """Nothing; ConfigError where no prompt or no image is asked for."""
    if not config.sample.images:
        raise ConfigError(f"{folder}: sample.images is 0 there, and nothing would be drawn; add sample.images=4")
    for title, templates in sheets.items():
        if not templates:
            raise ConfigError(f"{folder}: {title} has no prompt for this subject; give --prompt, or another --set")


def finished_config(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration that a subject was trained with, and overrides."""
    if not (folder / CONFIG_FILE).exists():
        raise DataError(f"{folder}: has no {CONFIG_FILE}; give a folder under OUT/subjects/")
    return load(folder / CONFIG_FILE, overrides)
