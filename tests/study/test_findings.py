"""What a study says: means over common subjects, the front, the cheapest that is good enough, and effects."""

import random

import pytest

from dbtrain.study.findings import Goal, Row, cheapest, effects, front, table, text_table, whole_cost, worse
from dbtrain.study.running import rounds
from tests.kit.made_up_study import VARIANTS, VARY, rows


def test_variants_are_compared_on_the_subjects_that_all_of_them_finished():
    lines = table(rows()[1:], VARIANTS)
    assert [round(line["dino"], 9) for line in lines] == [0.65, 0.75, 0.85, 0.95]
    assert [line.cost for line in lines] == [1, 1, 2, 2] and lines[0].means["dino"].count == 2
    assert table(rows()[:3], VARIANTS) == []


def test_the_front_holds_what_nothing_beats_in_cost_and_identity():
    lines = table(rows(), VARIANTS)
    assert [round(line["dino"], 9) for line in front(lines, Goal())] == [0.7, 0.9]
    assert [round(line["dino"], 9) for line in front(lines, Goal(pres=0.15))] == [0.6, 0.8]
    assert len(front(lines, Goal(pres=0.01))) == 2  # none keeps it: then all are looked at


def test_the_cheapest_that_is_good_enough():
    lines = table(rows(), VARIANTS)
    assert round(cheapest(lines, Goal(0.65))["dino"], 9) == 0.7
    assert round(cheapest(lines, Goal(0.75, 0.15))["dino"], 9) == 0.8
    assert cheapest(lines, Goal(0.85, 0.15)) is None
    good = cheapest(lines, Goal(0.65))
    assert Goal(0.55).surely_met_by(good) and not Goal(0.65).surely_met_by(good)


def test_effects_are_differences_of_pairs_that_differ_in_one_key():
    rate, steps = effects(rows(), VARIANTS, VARY)
    assert (rate.key, rate.first, rate.second, rate.pairs, rate.ratio) == ("train.lr", "0.001", "0.002", 2, 1.0)
    assert rate.differences["dino"].value == pytest.approx(0.1) == pytest.approx(rate.differences["dino"].low)
    assert (round(steps.ratio, 9), steps.pairs) == (2.0, 2)
    assert "raises DINO by 0.100" in rate.text and "(better)" in rate.text
    assert "raises PRES by 0.100" in rate.text and "(worse)" in rate.text
    assert "not shown: PRES +0.000" in steps.text


def test_an_effect_that_subjects_do_not_share_is_not_shown():
    rate, _ = effects(rows(noise=0.5), VARIANTS, VARY)
    assert rate.differences["dino"].low < 0 < rate.differences["dino"].high and "not shown: DINO +0.100" in rate.text


def test_variants_of_which_no_two_differ_in_one_key_alone_show_no_effect():
    apart = [variant for variant in VARIANTS if (variant.config.train.lr > 1e-3) == (variant.config.train.steps > 60)]
    assert len(apart) == 2 and effects(rows(), apart, VARY) == []


def test_texts():
    text = text_table(table(rows(), VARIANTS), Goal())
    assert text.splitlines()[0].split() == ["device-s", "DINO", "PRES", "variant"]
    assert sum(line.startswith("*") for line in text.splitlines()) == 2 and "0.700 [0.600, 0.800]" in text
    line = table(rows(), VARIANTS)[0]
    assert whole_cost(line, 3.0, 100, 2) == "100 subjects of 2 classes: 106 device-seconds, 6 of them for class images"
    assert "not counted" in whole_cost(line, None, 100, 2)


def test_a_variant_is_dropped_only_for_one_that_costs_no_more_and_is_better_on_all_the_interval():
    found = worse(rows(), VARIANTS, Goal())
    assert found.keys() == {"lr-1e-3-steps-60", "lr-1e-3-steps-120"}
    assert found["lr-1e-3-steps-60"].endswith("has a DINO higher by 0.100 [0.100, 0.100], on 3 subjects")
    assert worse(rows(noise=0.5), VARIANTS, Goal()) == {}  # the faster rate is better on the mean, and not on all
    assert worse(rows(), VARIANTS, Goal(pres=0.15)).keys() == set()  # the faster ones do not keep it


def studied(seed):
    """A made-up study of eight subjects: each variant has its level, each subject its own, each row its own luck."""
    luck = random.Random(seed)
    level = {variant.name: 0.5 + 0.05 * i for i, variant in enumerate(VARIANTS)}
    own = {f"s{i}": luck.gauss(0, 0.15) for i in range(8)}
    return [Row(v.name, s, "dog", 1.0, {"dino": level[v.name] + own[s] + luck.gauss(0, 0.04), "pres": 0.1})
            for v in VARIANTS for s in own]  # fmt: skip


def test_halving_keeps_what_the_full_grid_calls_best():
    kept, trained = 0, 0
    for seed in range(10):
        made, left, before = studied(seed), VARIANTS, 0
        best = max(table(made, VARIANTS), key=lambda line: line["dino"]).variant
        for count in rounds(8):
            trained, before = trained + len(left) * (count - before), count
            some = [row for row in made if int(row.subject[1:]) < count]
            left = [variant for variant in left if variant.name not in worse(some, left, Goal())]
        kept += best in left
    assert kept >= 9 and trained < 0.9 * 10 * len(VARIANTS) * 8
    assert rounds(3) == [3] and rounds(20) == [4, 8, 16, 20]
