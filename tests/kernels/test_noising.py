"""Fused noising: Philox words bit for bit, normals within their bound, latents as the training step draws them."""

from functools import partial

import pytest
import torch

from dbtrain.objective.timesteps import first_words, timestep_index
from dbtrain.randomness import Purpose, stream_key, uniforms
from dbtrain.settings.config import ObjectiveConfig
from dbtrain_kernels import reference
from dbtrain_kernels.cases import Case
from dbtrain_kernels.dispatch import interpreting
from dbtrain_kernels.noising import inputs, noising
from dbtrain_kernels.philox import normal, philox, uniform
from tests.kit.operations import on

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KEY = stream_key(3, "rex")
NORMAL_BOUND = 13 * 2.0**-24
"""Relative: half of 8 roundings for the logarithm, 1/2 for the root, 6 for cos or sin, 1 for the product, and slack."""
PURPOSES = tuple(map(int, (Purpose.POSTERIOR, Purpose.NOISE, Purpose.OFFSET, Purpose.TIMESTEP, Purpose.STRATUM)))
EDGES = [0, 1, 2, 2**29 - 1, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 - 2, 2**32 - 1]


def cases():
    """Elements that are no multiple of four, several blocks, long and short schedules, strata, each scalar option."""
    calls = {
        "plain": {},
        "one element": {"shape": (1, 1, 1, 1)},
        "several blocks": {"shape": (2, 4, 19, 29)},
        "scale and shift": {"scale": 0.18215, "shift": 0.0609},
        "noise offset": {"shape": (2, 5, 3, 3), "noise_offset": 0.1},
        "t of many": {"shape": (9, 1, 3, 3), "steps": 1000},
        "t of few": {"shape": (4, 4, 17, 19), "steps": 3},
        "t in strata": {"shape": (8, 1, 3, 5), "steps": 1000, "strata": 4},
        "all options": {
            "shape": (4, 6, 9, 5), "steps": 77, "scale": 1.5, "shift": -0.3, "noise_offset": 0.05, "strata": 3,
        },
    }  # fmt: skip
    return [Case(name, partial(inputs, **call)) for name, call in calls.items()]


def true_normals(words):
    """Box-Muller in float64, in the order of `philox.normal`."""
    u0, u1, u2, u3 = (uniform(word) for word in words)
    radii = (-2 * torch.log(u0)).sqrt(), (-2 * torch.log(u2)).sqrt()
    angles = 2 * torch.pi * u1, 2 * torch.pi * u3
    return torch.stack([f(angle) * radius for radius, angle in zip(radii, angles) for f in (torch.cos, torch.sin)])


def normals(key, purpose, step, slot, shape):
    """The normal numbers of one sample: four of each counter, in the order of the elements."""
    count = torch.Size(shape).numel()
    words = philox(key, (torch.arange((count + 3) // 4), slot, step, int(purpose)))
    return normal(words).flatten()[:count].view(shape)


@pytest.mark.parametrize("device", DEVICES)
def test_as_the_equation_says(device):
    """Each sample by itself, under its own key and slot."""
    key, other, step = stream_key(7, "rex"), stream_key(7, "tom"), 41
    slots, scale, shift = [0, 3, 4], 0.18215, 0.0609
    moments = torch.randn((3, 8, 5, 3), generator=torch.Generator().manual_seed(0))
    tables = {"alpha_S": torch.tensor([0.9, 0.5, 0.1]), "sigma_S": torch.tensor([0.4, 0.8, 0.99])}
    arguments = {
        "moments": moments,
        "key_B2": torch.tensor([key, key, other]),
        "slot_B": torch.tensor(slots),
        "step_B": torch.full((3,), step),
        **tables,
        "first_S": torch.tensor([0, 2**31, 3 * 2**30]),
    }
    got = noising(**on(device, arguments), purposes=PURPOSES, scale=scale, shift=shift, noise_offset=0.1)
    for b, (stream, slot) in enumerate(zip((key, key, other), slots)):
        mean, logvar = moments[b].chunk(2)
        z = normals(stream, Purpose.POSTERIOR, step, slot, (4, 5, 3))
        clean = (mean + (logvar / 2).exp() * z - shift) * scale
        noise = normals(stream, Purpose.NOISE, step, slot, (4, 5, 3))
        noise = noise + 0.1 * normals(stream, Purpose.OFFSET, step, slot, (4, 1, 1))
        alpha, sigma = (table_S[got.index_B[b]] for table_S in tables.values())
        for mine, want in zip(got, (clean, noise, alpha * clean + sigma * noise)):
            # Fewer than 16 roundings of terms no larger than 4 times the largest result, which is below 6.
            assert (mine[b].cpu() - want).abs().max() < 16 * 24 * 2.0**-24


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
    from tests.kit.words import draw

    generator = torch.Generator().manual_seed(2)
    counter = torch.randint(0, 2**32, (4, 2000), generator=generator)
    edges = torch.tensor(EDGES)
    counter[0, : len(EDGES)] = counter[1, : len(EDGES)] = counter[2, : len(EDGES)] = counter[3, : len(EDGES)] = edges
    for key in ((0, 0), (2**32 - 1, 2**31), (0x9E3779B9, 17)):
        assert torch.equal(draw(key, counter.to(device))[0].cpu(), torch.stack(philox(key, tuple(counter))))


@pytest.mark.parametrize("device", DEVICES)
def test_normals_are_within_the_bound(device):
    _needs_kernels(device)
    from tests.kit.words import draw

    counter = torch.zeros((4, 30000), dtype=torch.long)
    counter[0] = torch.arange(30000)
    words, got = (value.cpu() for value in draw((1, 2), counter.to(device)))
    want = true_normals(words)
    assert ((got.double() - want) / want).abs().max() < NORMAL_BOUND


def drawn_t(slots, device, steps=1000, **options):
    """The schedule indexes of the samples at these slots of step 17."""
    count = len(slots)
    arguments = {
        "moments": torch.zeros(count, 2, 1, 1),
        "key_B2": torch.tensor([KEY]).expand(count, 2),
        "slot_B": slots,
        "step_B": torch.full((count,), 17),
        "alpha_S": torch.zeros(steps),
        "sigma_S": torch.zeros(steps),
        **options,
    }
    return noising(**on(device, arguments), purposes=PURPOSES).index_B.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["uniform", "logit_normal"])
def test_t_is_that_of_the_distribution_bit_for_bit(name, device):
    """Through `objective.timesteps` in float64, which compares no words."""
    settings, slots = ObjectiveConfig(timesteps=name, logit_mean=0.3, logit_std=1.2), torch.arange(20)
    got = drawn_t(slots, device, first_S=first_words(settings, 1000, torch.device("cpu")))
    assert torch.equal(got, timestep_index(uniforms(KEY, Purpose.TIMESTEP, 17, slots), settings, 1000))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strata", [1, 3, 8, 20])
def test_each_stratum_has_one_sample_of_a_step(strata, device):
    """As arXiv 2107.00630, appendix I.1: one number in each of equal parts, and all of them turned by one number."""
    slots = torch.arange(strata)
    turn = uniforms(KEY, Purpose.STRATUM, 17, torch.zeros(1, dtype=torch.long))
    levels = (slots + uniforms(KEY, Purpose.TIMESTEP, 17, slots)) / strata
    got = drawn_t(slots, device, strata=strata)
    # The level is turned in another order of sums, so an index at a border may be the next one.
    assert ((got - ((levels + turn) % 1.0 * 1000).long()).abs() % 999 <= 1).all()
    relative = (((got + 0.5) / 1000 - turn) % 1.0 * strata).floor()
    assert sorted(relative.tolist()) == list(range(strata))


def test_strata_leave_the_whole_schedule_to_every_slot():
    """2000 steps of four slots; each slot's t is uniform by chi-square, so that no photo sees little noise only."""
    steps, cells = torch.arange(2000), 50
    slots, step_B = torch.arange(4).repeat(2000), steps.repeat_interleave(4)
    t = reference.timesteps(KEY, slots, step_B, PURPOSES[3:], 1000, None, 4)
    for slot in range(4):
        counts = torch.bincount(t[slots == slot] * cells // 1000, minlength=cells).double()
        chi_square = ((counts - 40) ** 2 / 40).sum().item()
        assert abs(chi_square - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5


def test_t_must_come_from_somewhere():
    with pytest.raises(ValueError, match="neither first_S nor strata"):
        drawn_t(torch.zeros(1, dtype=torch.long), "cpu")


def _needs_kernels(device):
    if device == "cpu" and not interpreting():
        pytest.skip("needs the kernels: see test_interpreter.py")
