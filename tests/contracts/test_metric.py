"""Contract of a metric: a row of METRICS equals plain loops in float64, and bears what must not change it."""

import math

import pytest
import torch

from dbtrain.evaluate.scores import METRICS, SCORES, SubjectFeatures, subject_scores, title

EXACT = 1e-12  # float64 dot products of tens of terms: a few units in the 16th digit


def rows(count, width=7, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def features(seed=0, generated=6, real=4, prompts=2):
    """Random features of a subject, with every part there."""
    pairs = generated * (generated // prompts - 1) // 2
    stream = torch.Generator().manual_seed(seed)
    return SubjectFeatures(
        real_identity_MD=rows(real, 7, seed),
        real_clip_MD=rows(real, 5, seed + 1),
        generated_identity_ND=rows(generated, 7, seed + 2),
        generated_clip_ND=rows(generated, 5, seed + 3),
        prompt_N=torch.arange(generated) % prompts,
        texts_with_identifier_ND=rows(generated, 5, seed + 4),
        texts_without_identifier_ND=rows(generated, 5, seed + 5),
        class_identity_PD=rows(3, 7, seed + 6),
        distance_pairs=torch.rand(pairs, generator=stream),
        pair_prompt=torch.arange(pairs) % prompts,
    )


def identical():
    """A subject whose pictures, photos, class images and texts are all the same."""
    one = torch.tensor([[3.0, -4.0]])
    return SubjectFeatures(
        **{name: one.expand(4, -1) for name in vars(SubjectFeatures()) if name.endswith("D")},
        prompt_N=torch.tensor([0, 0, 1, 1]),
        distance_pairs=torch.zeros(2),
        pair_prompt=torch.tensor([0, 1]),
    )


def plain_cosine(a, b):
    a, b = a.tolist(), b.tolist()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))


def all_pairs(here, there):
    return [(i, plain_cosine(a, b)) for i, a in enumerate(here) for b in there]


def other_pairs(rows_of):
    n = len(rows_of)
    return [(i, plain_cosine(rows_of[i], rows_of[j])) for i in range(n) for j in range(n) if i != j]


def own_text(images, texts):
    return [(i, plain_cosine(image, text)) for i, (image, text) in enumerate(zip(images, texts, strict=True))]


def gaps(s):
    found, prompt = [], s.prompt_N.tolist()
    for i, image in enumerate(s.generated_clip_ND):
        told = [plain_cosine(image, text) for text in s.texts_without_identifier_ND]
        others = [value for value, number in zip(told, prompt) if number != prompt[i]]
        found.append((i, told[i] - sum(others) / len(others)))
    return found


PLAIN = {
    "identity": lambda s: all_pairs(s.generated_identity_ND, s.real_identity_MD),
    "clip_i": lambda s: all_pairs(s.generated_clip_ND, s.real_clip_MD),
    "pres": lambda s: all_pairs(s.class_identity_PD, s.real_identity_MD),
    "clip_t": lambda s: own_text(s.generated_clip_ND, s.texts_with_identifier_ND),
    "clip_t_plain": lambda s: own_text(s.generated_clip_ND, s.texts_without_identifier_ND),
    "prompt_gap": gaps,
    "div": lambda s: list(zip(s.pair_prompt.tolist(), s.distance_pairs.tolist())),
    "real_identity": lambda s: other_pairs(s.real_identity_MD),
    "real_clip_i": lambda s: other_pairs(s.real_clip_MD),
}
"""Every metric written as loops: pairs (the number of what the value belongs to, value)."""


def test_every_metric_has_its_loops():
    assert PLAIN.keys() == METRICS.keys()


@pytest.mark.parametrize("key", METRICS)
def test_values_and_units_equal_plain_loops(key):
    s = features()
    values, units = METRICS[key].measure(s)
    assert values.dtype == torch.float64 and len(values) == len(units)
    got = sorted(zip(units.tolist(), values.tolist()))
    want = sorted(PLAIN[key](s))
    assert [unit for unit, _ in got] == [unit for unit, _ in want]
    assert [value for _, value in got] == pytest.approx([value for _, value in want], abs=EXACT)


@pytest.mark.parametrize("key", METRICS)
def test_undefined_without_its_parts(key):
    values, units = METRICS[key].measure(SubjectFeatures())
    assert values.numel() == units.numel() == 0 and values.dtype == torch.float64


@pytest.mark.parametrize("key", METRICS)
def test_the_order_of_images_changes_nothing(key):
    s = features()
    order, real = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 0, 3, 1])
    per_image = ("generated_identity_ND", "generated_clip_ND", "prompt_N", "texts_with_identifier_ND")
    changed = {name: getattr(s, name)[order] for name in (*per_image, "texts_without_identifier_ND")}
    changed |= {name: getattr(s, name)[real] for name in ("real_identity_MD", "real_clip_MD")}
    shuffled = SubjectFeatures(**{**vars(s), **changed})
    first, second = METRICS[key].measure(s).values, METRICS[key].measure(shuffled).values
    assert sorted(second.tolist()) == pytest.approx(sorted(first.tolist()), abs=EXACT)


@pytest.mark.parametrize("key", METRICS)
def test_identical_sets_give_one_and_have_no_distance(key):
    want = 0.0 if METRICS[key].score in ("div", "prompt_gap") else 1.0
    values = METRICS[key].measure(identical()).values
    assert len(values) and values.tolist() == pytest.approx([want] * len(values), abs=EXACT)


def directions(*numbers):
    """Unit rows along these axes of four."""
    return torch.eye(4)[list(numbers)]


GOOD = SubjectFeatures(
    real_identity_MD=directions(0, 0),
    real_clip_MD=directions(0, 0),
    generated_identity_ND=directions(0, 0, 0, 0) + 0.3 * directions(1, 2, 1, 2),
    generated_clip_ND=directions(0, 0, 0, 0) + directions(1, 1, 2, 2),
    prompt_N=torch.tensor([0, 0, 1, 1]),
    texts_with_identifier_ND=directions(1, 1, 2, 2),
    texts_without_identifier_ND=directions(1, 1, 2, 2),
    class_identity_PD=directions(3, 3),
    distance_pairs=torch.tensor([0.5, 0.5]),
    pair_prompt=torch.tensor([0, 1]),
)
"""Photos of one thing, pictures of it that differ and follow their prompts, and a class that stayed what it was."""
BAD = SubjectFeatures(
    real_identity_MD=directions(0, 1),
    real_clip_MD=directions(0, 1),
    generated_identity_ND=directions(3, 3, 3, 3),
    generated_clip_ND=directions(3, 3, 3, 3),
    prompt_N=torch.tensor([0, 0, 1, 1]),
    texts_with_identifier_ND=directions(1, 1, 2, 2),
    texts_without_identifier_ND=directions(1, 1, 2, 2),
    class_identity_PD=directions(0, 1),
    distance_pairs=torch.zeros(2),
    pair_prompt=torch.tensor([0, 1]),
)
"""Photos of two things, the same other thing for every prompt, and a class that is drawn as the subject."""


@pytest.mark.parametrize("key", METRICS)
def test_a_row_says_how_to_read_it(key):
    metric = METRICS[key]
    assert metric.meaning and metric.score.islower()
    assert metric.row == ("real" if key.startswith("real_") else "tuned")
    good, bad = (metric.measure(one).values.mean() for one in (GOOD, BAD))
    assert metric.better == ("higher" if good > bad else "lower") and abs(good - bad) > 0.05


def test_metrics_of_one_score_are_read_alike_and_have_one_title():
    assert {metric.score for metric in METRICS.values()} == set(SCORES)
    assert all(metric.better == SCORES[metric.score].better for metric in METRICS.values())
    assert [title(score) for score in SCORES][:3] == ["DINO", "CLIP-I", "CLIP-T"]


def test_a_subjects_scores_are_the_means_of_its_values():
    s = features()
    for row in ("tuned", "real"):
        found = subject_scores(s, row)
        for name, score in found.items():
            key = next(key for key, metric in METRICS.items() if (metric.score, metric.row) == (name, row))
            pairs = PLAIN[key](s)
            assert score.value == pytest.approx(sum(value for _, value in pairs) / len(pairs), abs=EXACT)
            assert score.count == len(pairs) and score.low <= score.value <= score.high
    assert set(found) == {"dino", "clip_i"}
