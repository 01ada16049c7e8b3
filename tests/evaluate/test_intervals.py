"""Averages and intervals against independent arithmetic."""

import math

import pytest
import torch

from dbtrain.evaluate import intervals
from dbtrain.evaluate.intervals import Interval, averaged, grouped, ratio, shown

EXACT = 1e-12  # float64 sums of hundreds of terms: some units in the 16th digit


def rows(count, width=7, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def mean_of(values, seed=0):
    """The mean of one value a subject."""
    return averaged(values, [1] * len(values), "macro", seed)


def test_macro_weighs_subjects_and_micro_weighs_values():
    means, counts = [1.0, 0.0, math.nan], [3, 1, 0]
    macro, micro = (averaged(means, counts, name) for name in ("macro", "micro"))
    assert (macro.value, micro.value, macro.count, micro.count) == (0.5, 0.75, 2, 2)
    assert (macro.low, macro.high) == (micro.low, micro.high) == (0.0, 1.0)
    assert math.isnan(averaged([], [], "macro").value) and averaged([math.nan], [0], "micro").count == 0


def test_intervals_of_averages_match_normal_theory():
    means, counts = rows(300, 1, 5).flatten().tolist(), [1 + i % 3 for i in range(300)]
    found = averaged(means, counts, "micro")
    weight = torch.tensor(counts).double()
    value = float((torch.tensor(means).double() * weight).sum() / weight.sum())
    # The delta method for a ratio of sums.
    error = float((weight * (torch.tensor(means).double() - value)).square().sum().sqrt() / weight.sum())
    assert found.value == pytest.approx(value, abs=EXACT)
    # 2000 resamples leave about 4% of noise in a half width.
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.12)


def test_blocks_of_resamples_are_all_drawn(monkeypatch):
    values, group = rows(40, 1, 6).flatten(), torch.arange(40)
    whole = grouped(values, group)
    monkeypatch.setattr(intervals, "CELLS", 40 * 7)
    blocked = grouped(values, group)
    assert blocked.value == whole.value and blocked.low == pytest.approx(whole.low, abs=0.03)
    assert grouped(values, group, seed=1) != blocked == grouped(values, group)


def test_json_has_no_nan():
    assert grouped(torch.zeros(0), torch.zeros(0)).row() == {"value": None, "low": None, "high": None, "count": 0}


def test_bootstrap_is_seeded_and_contains_its_value():
    values = torch.rand(12, generator=torch.Generator().manual_seed(1)).tolist()
    first = mean_of(values, seed=3)
    assert first == mean_of(values, seed=3) != mean_of(values, seed=4)
    assert first.low < first.value < first.high and first.count == 12
    before = torch.random.get_rng_state()
    mean_of(values)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bootstrap_matches_the_normal_theory_of_a_mean():
    values = torch.randn(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = mean_of(values.tolist())
    error = 1.96 * float(values.std(correction=0)) / math.sqrt(200)
    # 2000 resamples leave about 4% of noise in a half width.
    assert (found.high - found.low) / 2 == pytest.approx(error, rel=0.12)


def test_bootstrap_of_one_subject_and_of_none():
    alone = mean_of([0.3])
    assert (alone.value, shown(alone.row())) == (pytest.approx(0.3), "0.300") and math.isnan(alone.low + alone.high)
    assert alone.row("subjects") == {"value": pytest.approx(0.3), "low": None, "high": None, "subjects": 1}
    assert math.isnan(averaged([0.3, math.nan], [4, 4], "macro").low)
    one_group = grouped(torch.tensor([0.2, 0.4]), torch.tensor([7, 7]))
    assert (one_group.value, one_group.row()["low"], one_group.count) == (pytest.approx(0.3), None, 2)
    assert math.isnan(mean_of([math.nan]).value) and mean_of([]).count == 0
    assert mean_of([1.0, math.nan, 3.0]).value == 2.0


def test_an_interval_resamples_whole_groups():
    # Two images of 100 equal values each: an interval over single values would be narrow.
    values, image = torch.tensor([0.0] * 100 + [1.0] * 100), torch.arange(2).repeat_interleave(100)
    assert (grouped(values, image).low, grouped(values, image).high) == (0.0, 1.0)
    assert grouped(values, torch.arange(200)).high < 0.6


def test_resamples_without_a_ratio_are_left_out():
    nothing, count = torch.tensor([0.2, 0.1], dtype=torch.float64), torch.tensor([0.0, 0.5], dtype=torch.float64)
    assert ratio(nothing, count, 0) == pytest.approx((0.6, 0.2, 0.6))
    assert all(math.isnan(part) for part in ratio(nothing, torch.zeros(2), 0))


def test_an_interval_as_text():
    assert shown(Interval(0.5, 0.25, 0.75, 3).row()) == "0.500 [0.250, 0.750]"
    assert shown({"value": 0.5, "low": None, "high": None}) == "0.500" and shown({"value": None}) == ""
