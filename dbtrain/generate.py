"""Prompts and seeds to images: the stock diffusers pipeline over a base that stays loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image, ImageDraw

from dbtrain.config import SampleConfig
from dbtrain.families import Family, Models
from dbtrain.families.pipelines import assemble

SAMPLERS = {"ddpm": "DDPMScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler", "ddim": "DDIMScheduler"}


def make_pipeline(family: Family, models: Models, sampler: str | None = None) -> Any:
    """A diffusers pipeline around the loaded models, sharing their weights; sampler None keeps the model's own."""
    return assemble(family, models, SAMPLERS[sampler] if sampler else None)


def image_seed(*names: object) -> int:
    """A 63-bit seed named by its arguments."""
    digest = hashlib.blake2b("\x1f".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def generate(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], resolution: int, steps: int, guidance: float,
             precision: str = "fp32", batch: int = 8) -> Iterator[Image.Image]:
    """One RGB image for each (prompt, seed), in order.

    Every image has its own CPU generator, so its noise does not depend on the batch it is drawn in or on the device.
    """
    device = pipeline.device.type
    for start in range(0, len(prompts), batch):
        chunk = slice(start, start + batch)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[chunk]]
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            yield from pipeline(list(prompts[chunk]), generator=generators, height=resolution, width=resolution,
                                num_inference_steps=steps, guidance_scale=guidance, output_type="pil").images


def draw_samples(pipeline: Any, prompts: Sequence[str], settings: SampleConfig, resolution: int,
                 precision: str = "fp32") -> list[list[Image.Image]]:
    """A row of `settings.images` images for each prompt; image i of every row has seed `settings.seed` + i."""
    flat = [prompt for prompt in prompts for _ in range(settings.images)]
    seeds = [settings.seed + i for _ in prompts for i in range(settings.images)]
    images = list(generate(pipeline, flat, seeds, resolution, settings.steps, settings.guidance, precision))
    return [images[i * settings.images:(i + 1) * settings.images] for i in range(len(prompts))]


def grid(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str] | None = None, cell: int | None = None) -> Image.Image:
    """One sheet of image rows on white, each row under its caption; `cell` is the side of an image in pixels."""
    cell = cell or rows[0][0].width
    gap, header = 4, 16 if captions else 0
    width = max(len(row) for row in rows) * (cell + gap) + gap
    sheet = Image.new("RGB", (width, len(rows) * (cell + gap + header) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = gap + i * (cell + gap + header)
        if captions:
            pen.text((gap, top + 1), captions[i][: width // 6], fill="black")
        for j, image in enumerate(row):
            sheet.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (gap + j * (cell + gap), top + header))
    return sheet


@contextmanager
def sampling_mode(models: Models) -> Iterator[None]:
    """Evaluation mode for the trained parts, put back afterwards."""
    modules = [models.denoiser, *models.text_encoders.values()]
    before = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, before):
            module.train(training)
