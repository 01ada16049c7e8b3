"""The backgrounds: pictures of their own, and phrases that name one scene only."""

from itertools import combinations

import numpy as np
import pytest

from dbtrain_embedded.scenery import SCENES, paint


@pytest.mark.parametrize("side", [16, 64, 100, 128])
def test_a_scene_is_painted_at_any_size(side):
    picture = paint("city", np.random.default_rng(0), side)
    assert picture.size == (side, side) and picture.mode == "RGB"


def test_scenes_differ_more_from_each_other_than_in_themselves():
    pictures = {
        name: [np.asarray(paint(name, np.random.default_rng(seed)), float) for seed in (0, 1)] for name in SCENES
    }
    inside = [np.abs(first - second).mean() for first, second in pictures.values()]
    between = [np.abs(pictures[a][0] - pictures[b][0]).mean() for a, b in combinations(SCENES, 2)]
    assert min(inside) > 0 and max(inside) < np.median(between)


def test_no_phrase_names_two_scenes():
    phrases = [phrase for name in SCENES if name != "plain" for phrase in SCENES[name][1]]
    assert len(set(phrases)) == len(phrases) and all(phrases)
