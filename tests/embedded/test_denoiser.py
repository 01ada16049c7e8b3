"""The UNet's training: its timesteps, and a target that fits the scheduler it is sampled with."""

import numpy as np
import pytest
import torch

from dbtrain_embedded import denoiser


@pytest.mark.parametrize("count", [1, 7, 32])
def test_each_equally_likely_part_of_the_range_has_one_timestep(count):
    timesteps = denoiser.timesteps(count, np.random.default_rng(0))
    edges = [share * 1500 if share < 1 / 3 else 250 + share * 750 for share in np.arange(count + 1) / count]
    ordered = np.sort(timesteps)
    assert (np.floor(edges[:-1]) <= ordered).all() and (ordered < edges[1:]).all()


def test_a_class_of_many_drawings_and_changed_scenes_are_taken_more_often():
    plain = {"noun": "fox", "view": None, "colour": None, "accessory": None, "style": None}
    changes = {"colour": "red"}, {"view": "close"}, {"view": "far"}, {"noun": "dog"}
    rows = [plain, *({**plain, **change} for change in changes)]
    chances = denoiser.chances(rows)
    assert chances[-1] == 1
    # Four foxes and sixteen dogs are drawn: 4^0.75 = 2.83 times as often.
    assert np.allclose(np.diff(chances, prepend=0) / chances[0], [1, 2, 2, 1, 4**0.75])


def test_the_scheduler_finds_the_clean_latents_from_the_training_target():
    scheduler = denoiser.build_scheduler()
    scheduler.set_timesteps(1)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 16, 8, 8, generator=generator) for _ in range(2))
    timestep = int(scheduler.timesteps[0])
    alpha = scheduler.alphas_cumprod[timestep].sqrt()
    sigma = (1 - scheduler.alphas_cumprod[timestep]).sqrt()
    output = scheduler.step(alpha * noise - sigma * clean, timestep, alpha * clean + sigma * noise)
    # fp32: alpha^2 + sigma^2 is 1 within a few roundings of values up to 5.
    assert torch.allclose(output.pred_original_sample, clean, atol=1e-5)
