"""Fused noising: Philox words bit for bit, normals within their bound, latents as the training step draws them."""

import pytest
import torch

from dbtrain.objective.timesteps import Draw, first_words, timestep_index
from dbtrain.randomness import Purpose, normals, stream_key, uniforms
from dbtrain.settings.config import ObjectiveConfig
from dbtrain_kernels.cases import on
from dbtrain_kernels.dispatch import interpreting
from dbtrain_kernels.noising import noising
from dbtrain_kernels.philox import philox, uniform
from tests.kit.latents import sample_latents

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NORMAL_BOUND = 13 * 2.0**-24
"""Relative: half of 8 roundings for the logarithm, 1/2 for the root, 6 for cos or sin, 1 for the product, and slack."""
PURPOSES = tuple(map(int, (Purpose.POSTERIOR, Purpose.NOISE, Purpose.OFFSET, Purpose.TIMESTEP, Purpose.STRATUM)))
EDGES = [0, 1, 2, 2**29 - 1, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 - 2, 2**32 - 1]


def true_normals(words):
    """Box-Muller in float64, in the order of `philox.normal`."""
    u0, u1, u2, u3 = (uniform(word) for word in words)
    radii = (-2 * torch.log(u0)).sqrt(), (-2 * torch.log(u2)).sqrt()
    angles = 2 * torch.pi * u1, 2 * torch.pi * u3
    return torch.stack([f(angle) * radius for radius, angle in zip(radii, angles) for f in (torch.cos, torch.sin)])


class Vae:
    """Only what `sample_latents` reads."""

    class config:
        scaling_factor = 0.18215
        shift_factor = 0.0609


@pytest.mark.parametrize("device", DEVICES)
def test_as_the_training_step_draws(device):
    """Through `randomness` and `sample_latents`, which know nothing of the operation."""
    key, other, step = stream_key(7, "rex"), stream_key(7, "tom"), 41
    slots = torch.tensor([0, 3, 4])
    moments = torch.randn((3, 8, 5, 3), generator=torch.Generator().manual_seed(0))
    alpha_B, sigma_B = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.4, 0.8, 0.99])
    inputs = {
        "moments": moments,
        "key_B2": torch.tensor([key, key, other]),
        "slot_B": slots,
        "step_B": torch.full((3,), step),
        "alpha_S": alpha_B,
        "sigma_S": sigma_B,
        "index_B": torch.arange(3),
    }
    got = noising(**on(device, inputs), purposes=PURPOSES, scale=0.18215, shift=0.0609, noise_offset=0.1)
    for b, stream in enumerate((key, key, other)):
        row = slots[b : b + 1]
        z = normals(stream, Purpose.POSTERIOR, step, row, (4, 5, 3))
        clean = sample_latents(Vae, moments[b : b + 1], z)
        noise = normals(stream, Purpose.NOISE, step, row, (4, 5, 3))
        noise = noise + 0.1 * normals(stream, Purpose.OFFSET, step, row, (4, 1, 1))
        for mine, want in zip(got, (clean, noise, alpha_B[b] * clean + sigma_B[b] * noise)):
            # Fewer than 16 roundings of terms no larger than 4 times the largest result, which is below 6.
            assert (mine[b].cpu() - want[0]).abs().max() < 16 * 24 * 2.0**-24


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_does_not_depend_on_its_neighbours(device):
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "moments": torch.randn((4, 8, 5, 7), generator=generator),
        "key_B2": torch.randint(0, 2**32, (4, 2), generator=generator),
        "slot_B": torch.arange(4),
        "step_B": torch.tensor([1, 5, 5, 9]),
    }
    tables = on(device, {name: torch.rand(50, generator=generator) for name in ("alpha_S", "sigma_S")})
    tables["first_S"] = torch.arange(50, device=device) * 2**26
    whole = noising(**on(device, inputs), **tables, purposes=PURPOSES)
    order = torch.tensor([2, 0])
    some = noising(**on(device, {name: value[order] for name, value in inputs.items()}), **tables, purposes=PURPOSES)
    assert all(torch.equal(a, b[order]) for a, b in zip(some, whole))


@pytest.mark.parametrize("device", DEVICES)
def test_words_are_the_specification_bit_for_bit(device):
    _needs_kernels(device)
    from dbtrain_kernels.noising_triton import draw

    generator = torch.Generator().manual_seed(2)
    counter = torch.randint(0, 2**32, (4, 2000), generator=generator)
    edges = torch.tensor(EDGES)
    counter[0, : len(EDGES)] = counter[1, : len(EDGES)] = counter[2, : len(EDGES)] = counter[3, : len(EDGES)] = edges
    for key in ((0, 0), (2**32 - 1, 2**31), (0x9E3779B9, 17)):
        assert torch.equal(draw(key, counter.to(device))[0].cpu(), torch.stack(philox(key, tuple(counter))))


@pytest.mark.parametrize("device", DEVICES)
def test_normals_are_within_the_bound(device):
    _needs_kernels(device)
    from dbtrain_kernels.noising_triton import draw

    counter = torch.zeros((4, 30000), dtype=torch.long)
    counter[0] = torch.arange(30000)
    words, got = (value.cpu() for value in draw((1, 2), counter.to(device)))
    want = true_normals(words)
    assert ((got.double() - want) / want).abs().max() < NORMAL_BOUND


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name, strata", [("uniform", 0), ("logit_normal", 0), ("stratified", 4)])
def test_t_is_the_training_steps_bit_for_bit(name, strata, device):
    """Through `objective.timesteps` in float64, which knows nothing of words and thresholds."""
    key, step, steps = stream_key(3, "rex"), 17, 1000
    slots = torch.arange(60)
    rotation = uniforms(key, Purpose.STRATUM, step, torch.zeros(1, dtype=torch.long)).item()
    draw = Draw(uniforms(key, Purpose.TIMESTEP, step, slots), slots % 4, 4, rotation, 0.3, 1.2)
    inputs = {
        "moments": torch.zeros(60, 2, 1, 1),
        "key_B2": torch.tensor([key]).expand(60, 2),
        "slot_B": slots,
        "step_B": torch.full((60,), step),
        "alpha_S": torch.zeros(steps),
        "sigma_S": torch.zeros(steps),
    }
    if not strata:
        settings = ObjectiveConfig(timesteps=name, logit_mean=0.3, logit_std=1.2)
        inputs["first_S"] = first_words(settings, steps, torch.device("cpu"))
    got = noising(**on(device, inputs), purposes=PURPOSES, strata=strata).index_B
    assert torch.equal(got.cpu(), timestep_index(name, draw, steps))


def test_t_must_come_from_somewhere():
    inputs = {"moments": torch.zeros(1, 2, 1, 1), "key_B2": torch.zeros(1, 2, dtype=torch.long)}
    zeros = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="neither index_B nor first_S nor strata"):
        noising(**inputs, slot_B=zeros, step_B=zeros, alpha_S=zeros, sigma_S=zeros, purposes=PURPOSES)


def _needs_kernels(device):
    if device == "cpu" and not interpreting():
        pytest.skip("needs the kernels: see test_interpreter.py")
