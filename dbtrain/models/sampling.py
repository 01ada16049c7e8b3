"""Prompts and seeds to images: the stock diffusers pipeline over loaded models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from dbtrain.engines.capture import as_python
from dbtrain.models.adapters import chosen_rows
from dbtrain.models.family import Family, Models, low_side
from dbtrain.models.pipelines import assemble, words
from dbtrain.settings.config import RunConfig, SampleConfig


def make_pipeline(family: Family, models: Models, sampler: str | None = None) -> Any:
    """A diffusers pipeline around the loaded models, sharing their weights; None and `auto` keep its sampler."""
    return assemble(family, models, None if sampler in (None, "auto") else family.samplers[sampler])


SMALL = "small"
"""Key, in the `info` of a picture that a `Chain` drew, of the picture that its first stage drew."""


class Enlarger(NamedTuple):
    """A pipeline that enlarges pictures, and what it is told. times: sides of a large picture for one of a small one.
    bicubic: whether it is given them in the large size already. sized: whether it is told the size. level: noise of the
    small pictures, which must be that of its training. row_of: its adapter of each row that `generate` is given; None
    where they are the same."""

    pipeline: Any
    times: int
    bicubic: bool
    sized: bool
    level: int
    sample: SampleConfig
    precision: str
    row_of: dict[int, int] | None = None


def told_of_small(settings: RunConfig) -> dict[str, int | None]:
    """How a pipeline must be shown small pictures: their noise level, and their side where they are enlarged before."""
    side = settings.data.resolution if settings.super.enlarge == "bicubic" else None
    return {"level": settings.super.level, "enlarged_to": side}


class Chain(NamedTuple):
    """Pipelines that work one after another, in place of one. first: the one that draws, or pictures that are there, of
    one size; they are taken in turn."""

    first: Any
    then: tuple[Enlarger, ...]


def make_enlarger(family: Family, models: Models, settings: RunConfig) -> Enlarger:
    """What enlarges pictures with these models, as `settings` trained and sample it."""
    assert family.guide is not None
    times, level = settings.data.resolution // low_side(settings), settings.super.level
    bicubic = family.guide.enlarged and settings.super.enlarge == "bicubic"
    told = (times, bicubic, family.guide.enlarged, level, settings.sample, settings.train.precision)
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
    rows: Sequence[int] | None = None,
) -> Iterator[Image.Image]:
    """One RGB image for each (prompt, seed), in order. negative: what guidance leads away from; None is nothing.

    Every image has its own CPU generator, so its noise does not depend on the batch it is drawn in or on the device.
    Of a `Chain`, resolution, steps and guidance are the first pipeline's; its picture is `SMALL` in an image's `info`.
    rows: the adapter of each image, where the models carry the stacked adapters of several subjects. All batches then
    have one size, the last one filled up with what is drawn in vain: the size of a batch decides how its images are
    rounded, so no image depends on which others there are.
    """
    if isinstance(pipeline, Chain):
        if isinstance(pipeline.first, list):
            images = list(islice(cycle(pipeline.first), len(prompts)))
        else:
            chosen = (resolution, steps, guidance, precision, batch, negative, rows)
            images = list(generate(pipeline.first, prompts, seeds, *chosen))
        small = images
        for enlarger in pipeline.then:
            seeds = [image_seed(seed, "enlarged") for seed in seeds]
            images = list(enlarged(enlarger, images, prompts, seeds, batch, negative, rows))
        for image, before in zip(images, small):
            image.info[SMALL] = before
            yield image
        return
    told = {"height": resolution, "width": resolution, "num_inference_steps": steps}
    for drawn, kept in _parts(len(prompts), batch, rows):
        own = told | words(pipeline, [prompts[i] for i in drawn], negative, guidance)
        yield from _called(pipeline, drawn, seeds, precision, rows, own)[:kept]


@torch.no_grad()
def enlarged(
    enlarger: Enlarger,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch: int,
    negative: str | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[Image.Image]:
    """Each picture, enlarged under its prompt, in order; they have one size. negative and rows as in `generate`."""
    pipeline, sample = enlarger.pipeline, enlarger.sample
    if rows is not None and enlarger.row_of is not None:
        rows = [enlarger.row_of[row] for row in rows]
    told = {"noise_level": enlarger.level, "num_inference_steps": sample.steps}
    if enlarger.sized:
        width, height = pictures[0].size
        told |= {"height": height * enlarger.times, "width": width * enlarger.times}
    if enlarger.bicubic:
        pictures = [one.resize((told["width"], told["height"]), Image.Resampling.BICUBIC) for one in pictures]
    for drawn, kept in _parts(len(prompts), batch, rows):
        own = told | words(pipeline, [prompts[i] for i in drawn], negative, sample.guidance)
        own["image"] = [pictures[i] for i in drawn]
        yield from _called(pipeline, drawn, seeds, enlarger.precision, rows, own)[:kept]


def _parts(count: int, batch: int, rows: Sequence[int] | None) -> Iterator[tuple[list[int], int]]:
    """The images of each batch, and how many of them are kept. By rows, the last batch is filled up."""
    for start in range(0, count, batch):
        chunk = list(range(start, min(start + batch, count)))
        yield chunk if rows is None else chunk + chunk[-1:] * (batch - len(chunk)), len(chunk)


def _called(
    pipeline: Any,
    drawn: Sequence[int],
    seeds: Sequence[int],
    precision: str,
    rows: Sequence[int] | None,
    told: dict[str, Any],
) -> list[Image.Image]:
    """The images of one call, each with its own generator and, by rows, its own adapter."""
    generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in drawn]
    by_row = nullcontext() if rows is None else chosen_rows(modules(pipeline), [rows[i] for i in drawn])
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(pipeline.device.type, half, enabled=precision in ("bf16", "fp16")), by_row:
        return pipeline(generator=generators, output_type="pil", **told).images


def modules(pipeline: Any) -> list[nn.Module]:
    """The models of a pipeline."""
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def draw_samples(
    pipeline: Any,
    prompts: Sequence[str],
    settings: SampleConfig,
    resolution: int,
    precision: str = "fp32",
    negative: str | None = None,
    batch: int = 8,
    rows: Sequence[int] | None = None,
) -> list[list[Image.Image]]:
    """A row of `settings.images` images for each prompt; image i of every row has seed `settings.seed` + i.

    rows: the adapter of each prompt; see `generate`.
    """
    flat = [prompt for prompt in prompts for _ in range(settings.images)]
    seeds = [settings.seed + i for _ in prompts for i in range(settings.images)]
    own = None if rows is None else [row for row in rows for _ in range(settings.images)]
    chosen = (resolution, settings.steps, settings.guidance, precision, batch)
    images = list(generate(pipeline, flat, seeds, *chosen, negative=negative, rows=own))
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
