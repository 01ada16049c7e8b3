"""The demo's subjects are drawn as the shipped pictures are."""

import numpy as np
from PIL import Image

from dbtrain.tiny import ASSETS
from dbtrain_embedded import demo


def test_demo_pictures_are_the_committed_ones():
    for subject, side, folder in (("dog-tan", 64, "demo"), ("robot-white", 64, "demo"), ("dog-tan", 128, "demo/large")):
        for index, picture in enumerate(demo.pictures(subject, side=side)):
            assert np.array_equal(picture, Image.open(ASSETS / folder / subject / f"{index:02d}.png"))


def test_a_layout_is_the_same_at_twice_the_side(tmp_path):
    manifest = demo.write(tmp_path, ("teapot-red",), 128)
    assert manifest.read_text() == "subject,class,images\nteapot-red,teapot,teapot-red\n"
    small, others = demo.pictures("teapot-red"), demo.pictures("teapot-red", first=50)
    for index, picture in enumerate(small):
        large = Image.open(tmp_path / "teapot-red" / f"{index:02d}.png")
        again = np.asarray(large.resize((64, 64), Image.LANCZOS), dtype=float)
        assert large.size == (128, 128)
        assert np.abs(again - picture).mean() < 8 < np.abs(again - others[index]).mean()
