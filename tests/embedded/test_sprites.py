"""The atlases: art of every class, none of it in both, each drawing with its licence."""

from dbtrain_embedded import sprites, world


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


def test_the_large_atlases_hold_the_same_drawings_at_twice_the_size():
    for split in ("train", "heldout"):
        rows, small = sprites.load(split)
        assert sprites.load(split, 2)[0] == rows
        for one, two in zip(small, sprites.load(split, 2)[1], strict=True):
            assert abs(two.width - 2 * one.width) <= 4 and abs(two.height - 2 * one.height) <= 4
