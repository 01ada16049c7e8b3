"""Prompts and seeds to images: the stock diffusers pipeline over loaded models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from dbtrain.engines.capture import as_python
from dbtrain.models.family import Family, Models
from dbtrain.models.pipelines import arguments, assemble
from dbtrain.settings.config import SampleConfig


def make_pipeline(family: Family, models: Models, sampler: str | None = None) -> Any:
    """A diffusers pipeline around the loaded models, sharing their weights; None and `auto` keep its sampler."""
    return assemble(family, models, None if sampler in (None, "auto") else family.samplers[sampler])


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
    """
    device, told = pipeline.device.type, arguments(pipeline, guidance)
    for start in range(0, len(prompts), batch):
        chunk = slice(start, start + batch)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[chunk]]
        half = torch.float16 if precision == "fp16" else torch.bfloat16
        with torch.autocast(device, half, enabled=precision in ("bf16", "fp16")):
            yield from pipeline(
                prompt=list(prompts[chunk]),
                generator=generators,
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                output_type="pil",
                **told,
                **({} if negative is None else {"negative_prompt": [negative] * len(generators)}),
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
