"""Timestep distributions: chi-square and Kolmogorov-Smirnov at fixed seeds, exact strata, diffusers' logit-normal."""

import math

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from dbtrain.objective.timesteps import DISTRIBUTIONS, Draw, timestep_index
from dbtrain.randomness import Purpose, stream_key, uniforms

N = 20_000


def draw(seed=0, count=N, slots=4, rotation=0.3, mean=0.0, std=1.0):
    u = uniforms(stream_key(seed, "rex"), Purpose.TIMESTEP, 0, torch.arange(count))
    return Draw(u, torch.arange(count) % slots, slots, rotation, mean, std)


def chi_square_is_plausible(index, steps, cells=50):
    counts = torch.bincount(index * cells // steps, minlength=cells).double()
    expected = len(index) / cells
    value = ((counts - expected) ** 2 / expected).sum().item()
    return abs(value - (cells - 1)) < 5 * math.sqrt(2 * (cells - 1))


def ks_distance(values, cdf):
    """Greatest distance between the sample's distribution function and `cdf`."""
    ordered = values.sort().values
    above = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    expected = cdf(ordered)
    return max((above - expected).max().item(), (expected - above + 1 / len(ordered)).max().item())


KS_BOUND = math.sqrt(-math.log(1e-6 / 2) / (2 * N))
"""Exceeded by a right sampler once in a million seeds (Dvoretzky-Kiefer-Wolfowitz, with Massart's constant)."""


def test_uniform_is_uniform():
    index = timestep_index("uniform", draw(), 1000)
    assert chi_square_is_plausible(index, 1000)
    assert ks_distance(DISTRIBUTIONS["uniform"](draw()), lambda u: u) < KS_BOUND


def test_the_checks_see_a_wrong_distribution():
    skewed = DISTRIBUTIONS["uniform"](draw()) ** 1.1
    assert not chi_square_is_plausible((skewed * 1000).long(), 1000)
    assert ks_distance(skewed, lambda u: u) > KS_BOUND


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 1.0), (-1.0, 2.0)])
def test_logit_normal_has_its_distribution(mean, std):
    values = DISTRIBUTIONS["logit_normal"](draw(mean=mean, std=std))

    def cdf(u):
        return 0.5 * (1 + torch.erf((torch.logit(u) - mean) / (std * math.sqrt(2))))

    assert ks_distance(values, cdf) < KS_BOUND
    other = draw(mean=mean + 0.1, std=std)
    assert ks_distance(DISTRIBUTIONS["logit_normal"](other), cdf) > KS_BOUND / (1 + std)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 1.5)])
def test_logit_normal_is_diffusers_density(mean, std):
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling("logit_normal", N, mean, std, generator=generator).double().sort()[0]
    ours = DISTRIBUTIONS["logit_normal"](draw(mean=mean, std=std))
    empirical = ks_distance(ours, lambda u: torch.searchsorted(theirs, u, right=True).double() / N)
    assert empirical < 2 * KS_BOUND  # each sample is within KS_BOUND of the law


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("rotation", [1e-9, 0.3, 0.77, 1 - 1e-9])
def test_stratified_has_one_sample_in_each_stratum(slots, rotation):
    for seed in range(5):
        values = DISTRIBUTIONS["stratified"](draw(seed, slots, slots, rotation))
        strata = (((values - rotation) % 1.0) * slots).floor().long()
        assert sorted(strata.tolist()) == list(range(slots))
        assert ((values >= 0) & (values < 1)).all()


def test_stratified_is_uniform_over_the_steps():
    key, slots = stream_key(3, "rex"), 4
    index = []
    for step in range(2000):
        rotation = uniforms(key, Purpose.STRATUM, step, torch.zeros(1, dtype=torch.long)).item()
        u = uniforms(key, Purpose.TIMESTEP, step, torch.arange(slots))
        index.append(timestep_index("stratified", Draw(u, torch.arange(slots), slots, rotation, 0, 1), 1000))
    for slot in range(slots):  # every slot by itself, too: no photo sees only low noise
        assert chi_square_is_plausible(torch.stack(index)[:, slot], 1000)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_stays_in_the_schedule(name):
    ends = torch.tensor([2.0**-33, 0.5, 1 - 2.0**-33], dtype=torch.float64)
    for rotation in (2.0**-33, 0.5, 1 - 2.0**-33):
        index = timestep_index(name, Draw(ends, torch.tensor([0, 1, 2]), 3, rotation, 0.0, 1.0), 1000)
        assert index.dtype == torch.int64
        assert ((index >= 0) & (index <= 999)).all()


def test_uniform_reaches_the_first_and_the_last_step():
    ends = torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64)
    assert timestep_index("uniform", Draw(ends, torch.tensor([0, 1]), 2, 0.5, 0.0, 1.0), 1000).tolist() == [0, 999]
