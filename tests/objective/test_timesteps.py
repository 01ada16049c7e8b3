"""Timestep distributions: chi-square and Kolmogorov-Smirnov at fixed seeds, border words, diffusers' logit-normal."""

import math

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from dbtrain.objective import DISTRIBUTIONS, load
from dbtrain.objective.timesteps import first_words, logit_normal, shifted, timestep_index, uniform
from dbtrain.randomness import Purpose, stream_key, uniforms
from dbtrain.settings.config import ObjectiveConfig
from dbtrain_kernels.philox import uniform as uniform_of

N = 20_000


ENDS = torch.tensor([2.0**-33, 0.5, 1 - 2.0**-33], dtype=torch.float64)


def uniforms_of(seed=0, count=N):
    return uniforms(stream_key(seed, "rex"), Purpose.TIMESTEP, 0, torch.arange(count))


def settings(name, mean=0.0, std=1.0):
    return ObjectiveConfig(timesteps=name, logit_mean=mean, logit_std=std)


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
    index = timestep_index(uniforms_of(), settings("uniform"), 1000)
    assert chi_square_is_plausible(index, 1000)
    assert ks_distance(uniform(uniforms_of(), settings("uniform")), lambda u: u) < KS_BOUND


def test_the_checks_see_a_wrong_distribution():
    skewed = uniforms_of() ** 1.1
    assert not chi_square_is_plausible((skewed * 1000).long(), 1000)
    assert ks_distance(skewed, lambda u: u) > KS_BOUND


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 1.0), (-1.0, 2.0)])
def test_logit_normal_has_its_distribution(mean, std):
    values = logit_normal(uniforms_of(), settings("logit_normal", mean, std))

    def cdf(u):
        return 0.5 * (1 + torch.erf((torch.logit(u) - mean) / (std * math.sqrt(2))))

    assert ks_distance(values, cdf) < KS_BOUND
    other = logit_normal(uniforms_of(), settings("logit_normal", mean + 0.1, std))
    assert ks_distance(other, cdf) > KS_BOUND / (1 + std)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 1.5)])
def test_logit_normal_is_diffusers_density(mean, std):
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling("logit_normal", N, mean, std, generator=generator).double().sort()[0]
    ours = logit_normal(uniforms_of(), settings("logit_normal", mean, std))
    empirical = ks_distance(ours, lambda u: torch.searchsorted(theirs, u, right=True).double() / N)
    assert empirical < 2 * KS_BOUND  # each sample is within KS_BOUND of the law


@pytest.mark.parametrize("name", [name for name, function in DISTRIBUTIONS.items() if function])
def test_every_distribution_stays_in_the_schedule(name):
    index = timestep_index(ENDS, settings(name), 1000)
    assert index.dtype == torch.int64 and ((index >= 0) & (index <= 999)).all()


def test_uniform_reaches_the_first_and_the_last_step():
    assert timestep_index(ENDS, settings("uniform"), 1000).tolist() == [0, 500, 999]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_border_word_is_the_first_that_reaches_its_index(name):
    first_S = first_words(settings(name, 0.3, 1.2), 1000, torch.device("cpu"))
    if DISTRIBUTIONS[name] is None:  # t is drawn from strata instead
        assert first_S is None
        return
    inside_S = (first_S > 0) & (first_S < 2**32)
    at_S, before_S = (
        timestep_index(uniform_of(first_S[inside_S] - less), settings(name, 0.3, 1.2), 1000) for less in (0, 1)
    )
    index_S = torch.arange(1000)[inside_S]
    assert (at_S >= index_S).all() and (before_S < index_S).all() and inside_S.sum() > 900


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shift_moves_the_logit_of_the_level(shift):
    """Logit-normal(m, d) shifted by s is logit-normal(m + ln s, d), and the border words see the shift."""
    uniform_B = uniforms_of()
    moved = timestep_index(uniform_B, settings("logit_normal", 0.3, 0.8), 1000, shift)
    told = timestep_index(uniform_B, settings("logit_normal", 0.3 + math.log(shift), 0.8), 1000)
    assert (moved - told).abs().max() <= 1 and (moved == told).double().mean() > 0.999
    words = first_words(settings("logit_normal"), 1000, torch.device("cpu"), shift)
    want = first_words(settings("logit_normal", math.log(shift)), 1000, torch.device("cpu"))
    plain = first_words(settings("logit_normal"), 1000, torch.device("cpu"))
    assert (words - want).abs().max() <= 2 and (words != plain).any()


def test_no_shift_changes_no_bit():
    uniform_B = uniforms_of()
    for name in ("uniform", "logit_normal"):
        level_B = load(DISTRIBUTIONS[name])(uniform_B, settings(name))
        assert torch.equal(shifted(level_B, 1.0), level_B)
