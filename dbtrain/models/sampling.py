"""Prompts and seeds to images: the stock diffusers pipeline over loaded models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from PIL import Image

from dbtrain.engines.capture import as_python
from dbtrain.models.family import Family, Models, low_side
from dbtrain.models.pipelines import assemble, words
from dbtrain.settings.config import RunConfig, SampleConfig


def make_pipeline(family: Family, models: Models, sampler: str | None = None) -> Any:
    """A diffusers pipeline around the loaded models, sharing their weights; None and `auto` keep its sampler."""
    return assemble(family, models, None if sampler in (None, "auto") else family.samplers[sampler])


class Enlarger(NamedTuple):
    """A pipeline that enlarges pictures, and what it is told. times: sides of a large picture for one of a small one.
    sized: whether it is told the size. level: noise of the small pictures, which must be that of its training."""

    pipeline: Any
    times: int
    sized: bool
    level: int
    sample: SampleConfig
    precision: str


class Chain(NamedTuple):
    """Pipelines that work one after another, in place of one. first: the one that draws, or pictures that are there, of
    one size; they are taken in turn."""

    first: Any
    then: tuple[Enlarger, ...]


def make_enlarger(family: Family, models: Models, settings: RunConfig) -> Enlarger:
    """What enlarges pictures with these models, as `settings` trained and sample it."""
    assert family.guide is not None
    times, level = settings.data.resolution // low_side(settings), settings.super.level
    told = (times, family.guide.enlarged, level, settings.sample, settings.train.precision)
    return Enlarger(make_pipeline(family, models), *told)


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
    negative: str | None = None,
) -> Iterator[Image.Image]:
    """One RGB image for each (prompt, seed), in order. negative: what guidance leads away from; None is nothing.

    Every image has its own CPU generator, so its noise does not depend on the batch it is drawn in or on the device.
    Of a `Chain`, resolution, steps and guidance are the first pipeline's.
    """
    if isinstance(pipeline, Chain):
        images: Iterable[Image.Image]
        if isinstance(pipeline.first, list):
            images = islice(cycle(pipeline.first), len(prompts))
        else:
            images = generate(
                pipeline.first, prompts, seeds, resolution, steps, guidance, precision, batch, negative
            )
        for enlarger in pipeline.then:
            seeds = [image_seed(seed, "enlarged") for seed in seeds]
            images = enlarged(enlarger, list(images), prompts, seeds, batch, negative)
        yield from images
        return
    device = pipeline.device.type
    for start in range(0, len(prompts), batch):
        chunk = slice(start, start + batch)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[chunk]]
        told = words(pipeline, prompts[chunk], negative, guidance)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            yield from pipeline(
                generator=generators,
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                output_type="pil",
                **told,
            ).images


@torch.no_grad()
def enlarged(
    enlarger: Enlarger,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch: int,
    negative: str | None,
) -> Iterator[Image.Image]:
    """Each picture, enlarged under its prompt, in order; they have one size."""
    pipeline, sample = enlarger.pipeline, enlarger.sample
    told = {"noise_level": enlarger.level}
    if enlarger.sized:
        width, height = pictures[0].size
        told |= {"height": height * enlarger.times, "width": width * enlarger.times}
    for start in range(0, len(prompts), batch):
        chunk = slice(start, start + batch)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[chunk]]
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=enlarger.precision == "bf16"):
            yield from pipeline(
                image=list(pictures[chunk]),
                generator=generators,
                num_inference_steps=sample.steps,
                output_type="pil",
                **told,
                **words(pipeline, prompts[chunk], negative, sample.guidance),
            ).images


def draw_samples(
    pipeline: Any,
    prompts: Sequence[str],
    settings: SampleConfig,
    resolution: int,
    precision: str = "fp32",
    negative: str | None = None,
) -> list[list[Image.Image]]:
    """A row of `settings.images` images for each prompt; image i of every row has seed `settings.seed` + i."""
    flat = [prompt for prompt in prompts for _ in range(settings.images)]
    seeds = [settings.seed + i for _ in prompts for i in range(settings.images)]
    chosen = (resolution, settings.steps, settings.guidance, precision)
    images = list(generate(pipeline, flat, seeds, *chosen, negative=negative))
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
