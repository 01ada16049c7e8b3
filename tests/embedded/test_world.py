"""The picture world: deterministic, told truly, and free of held-out art."""

import re

import numpy as np
import pytest

from dbtrain_embedded import demo, pool, sprites, world
from dbtrain_embedded.scenery import SCENES


def test_scene_is_a_function_of_its_seed():
    first, caption, facts = world.scene(123)
    again, caption_again, facts_again = world.scene(123)
    assert np.array_equal(first, again) and caption == caption_again and facts == facts_again
    assert first.size == (64, 64) and first.mode == "RGB"
    assert not np.array_equal(first, world.scene(124)[0])


@pytest.mark.parametrize("seed", range(200))
def test_caption_tells_the_facts(seed):
    _, caption, facts = world.scene(seed)
    assert re.search(rf"\b{facts['noun']}\b", caption)
    told = {colour for colour in world.COLOURS if re.search(rf"\b{colour} {facts['noun']}\b", caption)}
    assert told == ({facts["colour"]} if facts["colour"] else set())
    worn = {item for item in sprites.ACCESSORIES if re.search(rf"wearing (a )?{item}\b", caption)}
    assert worn == ({facts["accessory"]} if facts["accessory"] else set())
    places = {place for place, (_, phrases) in SCENES.items() for phrase in phrases if phrase and phrase in caption}
    assert places == ({facts["place"]} if facts["place"] != "plain" else set())
    openings = world.STYLES.get(facts["style"], ("a photo of", "a picture of", "a close-up photo of", "a ", "an "))
    assert caption.startswith(tuple(openings))


def test_a_fact_changes_the_picture():
    plain = world.Facts("dog", sprites.of_noun("dog")[0])
    changed = [
        world.Facts("dog", plain.sprite, place="beach"),
        world.Facts("dog", plain.sprite, colour="red"),
        world.Facts("dog", plain.sprite, accessory="hat"),
        world.Facts("dog", plain.sprite, style="sketch"),
        world.Facts("dog", plain.sprite, view="far"),
        world.Facts("dog", sprites.of_noun("dog")[1]),
    ]
    base = np.asarray(world.render(plain, world.stream(1)), float)
    for facts in changed:
        assert np.abs(np.asarray(world.render(facts, world.stream(1)), float) - base).mean() > 2, facts


def test_red_is_red():
    facts = world.Facts("bear", sprites.of_noun("bear")[0], colour="red")
    pixels = np.asarray(world.render(facts, world.stream(3)), float)[24:44, 20:44]
    assert pixels[..., 0].mean() > 1.6 * pixels[..., 1].mean()


def test_article():
    assert [world.article(w) for w in ("dog", "owl", "orange cat", "umbrella")] == [
        "a dog",
        "an owl",
        "an orange cat",
        "an umbrella",
    ]


def test_training_atlas_has_no_held_out_art():
    assert not {row.vendor for row in sprites.load("train")[0]} & set(sprites.HELD_OUT)
    assert {row.vendor for row in sprites.load("heldout")[0]} == set(sprites.HELD_OUT)
    assert {facts["vendor"] for seed in range(300) for facts in [world.scene(seed)[2]]} <= set(sprites.VENDORS) - set(
        sprites.HELD_OUT
    )


def test_every_class_and_accessory_has_art_in_both_splits():
    for split in ("train", "heldout"):
        for noun in (*sprites.CLASSES, *sprites.ACCESSORIES):
            assert sprites.of_noun(noun, split), (noun, split)


def test_every_sprite_names_a_licence():
    for split in ("train", "heldout"):
        for row in sprites.load(split)[0]:
            assert row.licence == sprites.VENDORS[row.vendor][0]


def test_pool_draws_the_same_scenes(tmp_path):
    pool.draw(tmp_path, 3, first_seed=7, workers=1)
    for index in range(3):
        image, caption, facts = world.scene(7 + index)
        assert np.array_equal(pool.pictures(tmp_path)[index], image)
        row = pool.facts(tmp_path)[index]
        assert row["caption"] == caption and row["sprite"] == facts["sprite"]


def test_demo_pictures_are_the_committed_ones():
    from PIL import Image

    from dbtrain.tiny import ASSETS

    for subject in ("dog-tan", "robot-white"):
        for index, picture in enumerate(demo.pictures(subject)):
            assert np.array_equal(picture, Image.open(ASSETS / "demo" / subject / f"{index:02d}.png"))
