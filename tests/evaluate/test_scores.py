"""The parts of the scores on known sets."""

import pytest
import torch

from dbtrain.evaluate.scores import METRICS, SubjectFeatures, across, cosines, paired, prompt_gap, within

EXACT = 1e-12  # float64 dot products of tens of terms: a few units in the 16th digit


def rows(count, width=7, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def features(generated=6):
    return SubjectFeatures(generated_clip_ND=rows(generated, 5, 3), texts_with_identifier_ND=rows(generated, 5, 4))


def test_pairing_matters_to_clip_t():
    s = features()
    turned = SubjectFeatures(**{**vars(s), "texts_with_identifier_ND": s.texts_with_identifier_ND.flip(0)})
    got, other = (METRICS["clip_t"].measure(one).values.mean().item() for one in (s, turned))
    assert abs(got - other) > 1e-3


def test_identical_pictures_score_one():
    same = rows(1).expand(4, -1)
    assert across(same, same).values.tolist() == pytest.approx([1.0] * 16, abs=EXACT)
    assert within(same).values.tolist() == pytest.approx([1.0] * 12, abs=EXACT)


def test_orthogonal_opposite_and_scaled_rows():
    e = torch.eye(3)
    assert cosines(e, e).tolist() == e.tolist()
    assert paired(e, -5 * e).values.tolist() == pytest.approx([-1.0] * 3, abs=EXACT)


def test_self_pairs_are_left_out():
    orthogonal = torch.eye(4)
    assert within(orthogonal).values.tolist() == [0.0] * 12
    assert within(orthogonal[:1]).values.numel() == 0


def test_unequal_pairs_are_refused():
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired(rows(2), rows(3))


def test_a_prompt_that_has_no_effect_has_no_gap():
    texts = torch.eye(3)
    assert prompt_gap(texts, texts, torch.arange(3)).values.tolist() == pytest.approx([1.0] * 3, abs=EXACT)
    assert prompt_gap(torch.ones(3, 3), texts, torch.arange(3)).values.tolist() == pytest.approx([0.0] * 3, abs=EXACT)
    assert prompt_gap(texts, texts, torch.zeros(3)).values.numel() == 0


def test_values_say_which_image_they_are_of():
    three, two = torch.eye(3), torch.eye(3)[:2]
    assert across(three, two).unit.tolist() == [0, 0, 1, 1, 2, 2]
    assert within(three).unit.tolist() == [0, 0, 1, 1, 2, 2]
    assert paired(three, three).unit.tolist() == [0, 1, 2]
    assert prompt_gap(three, three, torch.arange(3)).unit.tolist() == [0, 1, 2]


def test_without_texts_there_is_nothing_to_pair():
    assert paired(rows(3), torch.zeros(0, 1)).values.shape == (0,)
