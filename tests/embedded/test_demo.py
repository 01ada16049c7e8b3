"""The demo's subjects are drawn as the shipped pictures are."""

import numpy as np
from PIL import Image

from dbtrain.tiny import ASSETS
from dbtrain_embedded import demo


def test_demo_pictures_are_the_committed_ones():
    for subject in ("dog-tan", "robot-white"):
        for index, picture in enumerate(demo.pictures(subject)):
            assert np.array_equal(picture, Image.open(ASSETS / "demo" / subject / f"{index:02d}.png"))
