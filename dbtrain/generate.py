"""Prompts and seeds to images: the stock diffusers pipeline over a loaded base, many adapters in turn."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dbtrain.adapters import LoraWeights, attach, detach, write_rows
from dbtrain.config import ModelConfig, RunConfig, SampleConfig
from dbtrain.configfile import load
from dbtrain.engines.capture import as_python
from dbtrain.errors import ConfigError, DataError
from dbtrain.families import FAMILIES, Family, Models, load_models
from dbtrain.families.pipelines import assemble
from dbtrain.prompts import application, fill, read_set
from dbtrain.publish import CONFIG_FILE, LORA_FILE, MODEL_FOLDER, publish_sheet, read_lora
from dbtrain.record import finished_record

SHEET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""What the name of a sheet looks like; it becomes a file's and a folder's."""
SAMPLERS = {"ddpm": "DDPMScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler", "ddim": "DDIMScheduler"}


def make_pipeline(family: Family, models: Models, sampler: str | None = None) -> Any:
    """A diffusers pipeline around the loaded models, sharing their weights; sampler None keeps the model's own."""
    return assemble(family, models, SAMPLERS[sampler] if sampler else None)


def image_seed(*names: object) -> int:
    """A 63-bit seed named by its arguments."""
    digest = hashlib.blake2b("\x1f".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    resolution: int,
    steps: int,
    guidance: float,
    precision: str = "fp32",
    batch: int = 8,
) -> Iterator[Image.Image]:
    """One RGB image for each (prompt, seed), in order.

    Every image has its own CPU generator, so its noise does not depend on the batch it is drawn in or on the device.
    """
    device = pipeline.device.type
    for start in range(0, len(prompts), batch):
        chunk = slice(start, start + batch)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[chunk]]
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            yield from pipeline(
                list(prompts[chunk]),
                generator=generators,
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="pil",
            ).images


def draw_samples(
    pipeline: Any, prompts: Sequence[str], settings: SampleConfig, resolution: int, precision: str = "fp32"
) -> list[list[Image.Image]]:
    """A row of `settings.images` images for each prompt; image i of every row has seed `settings.seed` + i."""
    flat = [prompt for prompt in prompts for _ in range(settings.images)]
    seeds = [settings.seed + i for _ in prompts for i in range(settings.images)]
    images = list(generate(pipeline, flat, seeds, resolution, settings.steps, settings.guidance, precision))
    return [images[i * settings.images : (i + 1) * settings.images] for i in range(len(prompts))]


@contextmanager
def sampling_mode(models: Models) -> Iterator[None]:
    """Evaluation mode for the trained parts, and compiled ones as Python, put back afterwards."""
    modules = [models.denoiser, *models.text_encoders.values()]
    before = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        with as_python(models.denoiser):
            yield
    finally:
        for module, training in zip(modules, before):
            module.train(training)


def refuse_misfit(components: dict[str, torch.nn.Module], weights: LoraWeights) -> None:
    """Nothing; DataError unless every matrix of an adapter belongs to a layer of the base, in that layer's shape."""
    for component, matrices in weights.matrices.items():
        for path, (down, up) in matrices.items():
            try:
                weight = components[component].get_submodule(path).weight
            except (KeyError, AttributeError) as error:
                raise DataError(f"adapter: {component}.{path} is no layer of this base; use its own base") from error
            want = ((weights.rank, weight[0].numel()), (weight.shape[0], weights.rank))
            if not isinstance(weight, torch.Tensor) or weight.dim() < 2 or (down.shape, up.shape) != want:
                got = f"{tuple(down.shape)} and {tuple(up.shape)}"
                wanted = f"{want[0]} and {want[1]}"
                raise DataError(f"adapter: {component}.{path}: got {got}, want {wanted}; use its own base")


@contextmanager
def adapter(family: Family, models: Models, weights: LoraWeights) -> Iterator[None]:
    """The base with an adapter on it; afterwards the base as it was."""
    components = models.components(family.denoiser_name)
    refuse_misfit(components, weights)
    for name, matrices in weights.matrices.items():
        attach(components[name], matrices, 1, weights.rank, weights.alpha)
    try:
        write_rows(components, 0, weights)
        yield
    finally:
        for module in components.values():
            detach(module)


@contextmanager
def finished_pipeline(folder: Path | None, family: Family, models: Models, config: RunConfig) -> Iterator[Any]:
    """The pipeline of a finished subject: the base with its adapter on it, or its own model; of the base for None."""
    with sampling_mode(models):
        if folder is None:
            yield make_pipeline(family, models)
        elif (folder / LORA_FILE).exists():
            with adapter(family, models, read_lora(folder)[0]):
                yield make_pipeline(family, models)
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
) -> Iterator[Path]:
    """The sheets drawn for each finished subject folder; adapters of one base share it, loaded once.

    prompts: templates with `{subject}`; None are those of the subject's own recipe. sets: names of prompt sets, each a
    sheet of its own name, in place of prompts. overrides: `a.b=c` settings.
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
        with finished_pipeline(folder, family, warm.load(config.model), config) as pipeline:
            for title, templates in sheets.items():
                texts = [fill(one, identifier=record["identifier"], class_noun=noun) for one in templates]
                rows = draw_samples(pipeline, texts, config.sample, config.data.resolution, config.train.precision)
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
