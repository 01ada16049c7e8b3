"""A pool on disk holds the scenes of its seeds."""

import numpy as np

from dbtrain_embedded import pool, world


def test_pool_draws_the_same_scenes(tmp_path):
    pool.draw(tmp_path, 3, first_seed=7, workers=1)
    for index in range(3):
        image, caption, facts = world.scene(7 + index)
        assert np.array_equal(pool.pictures(tmp_path)[index], image)
        row = pool.facts(tmp_path)[index]
        assert row["caption"] == caption and row["sprite"] == facts["sprite"]
