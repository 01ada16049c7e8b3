"""The parts of the scores on known sets, and their averages and intervals against independent arithmetic."""

import math

import pytest
import torch

from dbtrain.evaluate.intervals import averaged, bootstrap, closed_share, grouped, mean_interval
from dbtrain.evaluate.scores import METRICS, SubjectFeatures, across, cosines, paired, prompt_gap, spread, within

EXACT = 1e-12  # float64 dot products of tens of terms: a few units in the 16th digit


def rows(count, width=7, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def features(generated=6):
    return SubjectFeatures(generated_clip_ND=rows(generated, 5, 3), texts_with_identifier_ND=rows(generated, 5, 4))


def test_pairing_matters_to_clip_t():
    s = features()
    turned = SubjectFeatures(**{**vars(s), "texts_with_identifier_ND": s.texts_with_identifier_ND.flip(0)})
    got, other = (METRICS["clip_t"].values(one).mean().item() for one in (s, turned))
    assert abs(got - other) > 1e-3


def test_identical_pictures_score_one_and_do_not_vary():
    same = rows(1).expand(4, -1)
    assert across(same, same).tolist() == pytest.approx([1.0] * 16, abs=EXACT)
    assert within(same).tolist() == pytest.approx([1.0] * 12, abs=EXACT)
    assert spread(same, torch.zeros(4)).tolist() == pytest.approx([0.0] * 12, abs=EXACT)


def test_orthogonal_opposite_and_scaled_rows():
    e = torch.eye(3)
    assert cosines(e, e).tolist() == e.tolist()
    assert paired(e, -5 * e).tolist() == pytest.approx([-1.0] * 3, abs=EXACT)


def test_self_pairs_are_left_out():
    orthogonal = torch.eye(4)
    assert within(orthogonal).tolist() == [0.0] * 12
    assert within(orthogonal[:1]).numel() == 0


def test_diversity_compares_images_of_one_prompt_only():
    a, b = torch.eye(2)
    assert spread(torch.stack([a, b, a, b]), torch.tensor([0, 1, 0, 1])).tolist() == pytest.approx([0] * 4, abs=EXACT)
    assert spread(torch.stack([a, b]), torch.tensor([0, 1])).numel() == 0


def test_unequal_pairs_are_refused():
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired(rows(2), rows(3))


def test_a_prompt_that_has_no_effect_has_no_gap():
    texts = torch.eye(3)
    assert prompt_gap(texts, texts, torch.arange(3)).tolist() == pytest.approx([1.0] * 3, abs=EXACT)
    assert prompt_gap(torch.ones(3, 3), texts, torch.arange(3)).tolist() == pytest.approx([0.0] * 3, abs=EXACT)
    assert prompt_gap(texts, texts, torch.zeros(3)).numel() == 0


def test_macro_weighs_subjects_and_micro_weighs_values():
    means, counts = [1.0, 0.0, math.nan], [3, 1, 0]
    macro, micro = (averaged(means, counts, name) for name in ("macro", "micro"))
    assert (macro.value, micro.value, macro.subjects, micro.subjects) == (0.5, 0.75, 2, 2)
    assert (macro.low, macro.high) == (micro.low, micro.high) == (0.0, 1.0)
    assert math.isnan(averaged([], [], "macro").value) and averaged([math.nan], [0], "micro").subjects == 0


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
    from dbtrain.evaluate import intervals

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
    first = mean_interval(values, seed=3)
    assert first == mean_interval(values, seed=3) != mean_interval(values, seed=4)
    assert first.low < first.value < first.high and first.subjects == 12
    before = torch.random.get_rng_state()
    mean_interval(values)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bootstrap_matches_the_normal_theory_of_a_mean():
    values = torch.randn(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = mean_interval(values.tolist(), resamples=4000)
    error = 1.96 * float(values.std(correction=0)) / math.sqrt(200)
    # 4000 resamples leave about 4% of noise in a half width.
    assert (found.high - found.low) / 2 == pytest.approx(error, rel=0.12)


def test_bootstrap_of_one_subject_and_of_none():
    alone = mean_interval([0.3])
    assert (alone.value, str(alone)) == (pytest.approx(0.3), "0.300") and math.isnan(alone.low + alone.high)
    assert alone.row() == {"value": pytest.approx(0.3), "low": None, "high": None, "subjects": 1}
    assert math.isnan(averaged([0.3, math.nan], [4, 4], "macro").low)
    one_group = grouped(torch.tensor([0.2, 0.4]), torch.tensor([7, 7]))
    assert (one_group.value, one_group.row()["low"], one_group.count) == (pytest.approx(0.3), None, 2)
    assert math.isnan(mean_interval([math.nan]).value) and mean_interval([]).subjects == 0
    assert mean_interval([1.0, math.nan, 3.0]).value == 2.0


def test_bootstrap_resamples_whole_subjects():
    seen = set()
    bootstrap(lambda chosen: float(len(seen.add(tuple(chosen)) or chosen)), 3, resamples=50)
    assert all(len(chosen) == 3 and set(chosen) <= {0, 1, 2} for chosen in seen) and len(seen) > 5


def test_closed_share_is_of_the_means():
    found = closed_share([0.2, 0.4], [0.5, 0.7], [0.6, 1.0])
    assert found.value == pytest.approx((0.6 - 0.3) / (0.8 - 0.3))
    assert closed_share([0.2], [0.2], [0.9]).value == 0
    assert closed_share([0.2], [0.9], [0.9]).value == pytest.approx(1)
    assert math.isnan(closed_share([0.2], [0.5], [0.2]).value)
    # Half of the resamples hold one subject only, and those of the first have no gap; they say nothing.
    found = closed_share([0.0, 0.5], [0.2, 0.6], [0.0, 1.0])
    assert found.value == pytest.approx(0.6) and found.low == pytest.approx(0.2) and found.high == pytest.approx(0.6)
