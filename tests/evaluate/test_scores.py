"""Scores against plain loops in float64, on known sets, and under what must not change them."""

import math

import pytest
import torch

from dbtrain.evaluate.scores import (
    METRICS,
    SubjectFeatures,
    across,
    bootstrap,
    closed_share,
    cosines,
    macro,
    mean_interval,
    micro,
    paired,
    score,
    spread,
    within,
)

EXACT = 1e-12  # float64 dot products of tens of terms: a few units in the 16th digit


def rows(count, width=7, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def plain_cosine(a, b):
    a, b = a.tolist(), b.tolist()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))


def features(seed=0, generated=6, real=4, prompts=2):
    return SubjectFeatures(
        real_identity_MD=rows(real, 7, seed),
        real_clip_MD=rows(real, 5, seed + 1),
        generated_identity_ND=rows(generated, 7, seed + 2),
        generated_clip_ND=rows(generated, 5, seed + 3),
        prompt_N=torch.arange(generated) % prompts,
        texts_with_identifier_ND=rows(generated, 5, seed + 4),
        texts_without_identifier_ND=rows(generated, 5, seed + 5),
        class_identity_PD=rows(3, 7, seed + 6),
        lpips_pairs=torch.rand(5, generator=torch.Generator().manual_seed(seed)),
    )


def plain_values(key, s):
    """The same value lists written as loops."""
    if key in ("identity", "clip_i", "pres"):
        here = {"identity": s.generated_identity_ND, "clip_i": s.generated_clip_ND, "pres": s.class_identity_PD}[key]
        there = s.real_clip_MD if key == "clip_i" else s.real_identity_MD
        return [plain_cosine(a, b) for a in here for b in there]
    if key in ("clip_t", "clip_t_plain"):
        texts = s.texts_with_identifier_ND if key == "clip_t" else s.texts_without_identifier_ND
        return [plain_cosine(s.generated_clip_ND[i], texts[i]) for i in range(len(texts))]
    if key in ("real_identity", "real_clip_i"):
        real = s.real_identity_MD if key == "real_identity" else s.real_clip_MD
        return [plain_cosine(real[i], real[j]) for i in range(len(real)) for j in range(len(real)) if i < j]
    if key == "div_identity":
        made, prompt = s.generated_identity_ND, s.prompt_N.tolist()
        pairs = [(i, j) for i in range(len(made)) for j in range(i) if prompt[i] == prompt[j]]
        return [1 - plain_cosine(made[i], made[j]) for i, j in pairs]
    return [float(x) for x in s.lpips_pairs]


@pytest.mark.parametrize("key", METRICS)
def test_every_metric_equals_plain_loops(key):
    s = features()
    got, want = METRICS[key].values(s), plain_values(key, s)
    assert got.dtype == torch.float64
    assert sorted(got.tolist()) == pytest.approx(sorted(want), abs=EXACT)


@pytest.mark.parametrize("key", METRICS)
def test_every_metric_is_undefined_without_its_parts(key):
    assert METRICS[key].values(SubjectFeatures()).numel() == 0


@pytest.mark.parametrize("key", METRICS)
def test_the_order_of_images_changes_no_metric(key):
    s = features()
    order, real = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 0, 3, 1])
    per_image = ("generated_identity_ND", "generated_clip_ND", "prompt_N", "texts_with_identifier_ND")
    changed = {name: getattr(s, name)[order] for name in (*per_image, "texts_without_identifier_ND")}
    changed |= {name: getattr(s, name)[real] for name in ("real_identity_MD", "real_clip_MD")}
    shuffled = SubjectFeatures(**{**vars(s), **changed})
    assert micro([METRICS[key].values(shuffled)]) == pytest.approx(micro([METRICS[key].values(s)]), abs=EXACT)


def test_pairing_matters_to_clip_t():
    s = features()
    turned = SubjectFeatures(**{**vars(s), "texts_with_identifier_ND": s.texts_with_identifier_ND.flip(0)})
    assert micro([METRICS["clip_t"].values(turned)]) != pytest.approx(micro([METRICS["clip_t"].values(s)]), abs=1e-3)


def test_identical_pictures_score_one_and_do_not_vary():
    same = rows(1).expand(4, -1)
    assert across(same, same).tolist() == pytest.approx([1.0] * 16, abs=EXACT)
    assert within(same).tolist() == pytest.approx([1.0] * 6, abs=EXACT)
    assert spread(same, torch.zeros(4)).tolist() == pytest.approx([0.0] * 6, abs=EXACT)


def test_orthogonal_opposite_and_scaled_rows():
    e = torch.eye(3)
    assert cosines(e, e).tolist() == e.tolist()
    assert paired(e, -5 * e).tolist() == pytest.approx([-1.0] * 3, abs=EXACT)


def test_self_pairs_are_left_out():
    orthogonal = torch.eye(4)
    assert within(orthogonal).tolist() == [0.0] * 6
    assert within(orthogonal[:1]).numel() == 0


def test_diversity_compares_images_of_one_prompt_only():
    a, b = torch.eye(2)
    assert spread(torch.stack([a, b, a, b]), torch.tensor([0, 1, 0, 1])).tolist() == pytest.approx([0, 0], abs=EXACT)
    assert spread(torch.stack([a, b]), torch.tensor([0, 1])).numel() == 0


def test_unequal_pairs_are_refused():
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired(rows(2), rows(3))


def test_macro_weighs_subjects_and_micro_weighs_values():
    groups = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0]), torch.zeros(0)]
    assert (macro(groups), micro(groups)) == (0.5, 0.75)
    assert math.isnan(macro([])) and math.isnan(micro([torch.zeros(0)]))


def test_score_holds_both_averages_of_what_was_measured():
    subjects = [features(0), features(20, generated=4)]
    table = score(subjects)
    for key in METRICS:
        values = [plain_values(key, s) for s in subjects]
        flat = [v for group in values for v in group]
        assert table[key]["macro"].value == pytest.approx(sum(sum(v) / len(v) for v in values) / 2, abs=EXACT)
        assert table[key]["micro"].value == pytest.approx(sum(flat) / len(flat), abs=EXACT)
    assert set(score([SubjectFeatures(real_identity_MD=rows(3))])) == {"real_identity"}


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
    assert (mean_interval([0.3]).low, mean_interval([0.3]).high) == (pytest.approx(0.3), pytest.approx(0.3))
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
