"""The bank: a draw is a pure function of (step, slot), whatever ranks, micro-batches, caches and resumes do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dbtrain.data.images import flip, open_photo, square, to_pixels
from dbtrain.data.index import order
from dbtrain.engines.engine import plan_batches
from dbtrain.engines.world import World
from dbtrain.settings.config import DataConfig
from dbtrain.training.bank import Bank, Item, join_batches
from dbtrain.values import Batch, Role
from tests.kit.made_photos import picture, png
from tests.kit.main_job import make_bank, rig, sample, small_config

BATCH = 8


def bank(priors=True, subject="rex", seed=0, **data) -> Bank:
    items = {Role.INSTANCE: [Item(sample(i), "a photo of srx dog") for i in range(3)]}
    if priors:
        items[Role.PRIOR] = [Item(sample(i, Role.PRIOR, 40, 64), "a photo of a dog") for i in range(5)]
    return Bank(items, DataConfig(resolution=32, **data), seed, subject, BATCH)


def rows(batch: Batch) -> dict[int, tuple]:
    """Slot -> everything else of the sample."""
    names = [name for name, value in vars(batch).items() if name not in ("slot_B", "subject_B") and value is not None]
    return {
        int(slot): tuple(getattr(batch, name)[i].numpy().tobytes() for name in names)
        for i, slot in enumerate(batch.slot_B)
    }


def drawn(made: Bank, step: int, ranks: int, micro: int) -> dict[int, tuple]:
    """One global step over all ranks and turns; no slot may come twice."""
    plan, found = plan_batches(BATCH, micro, ranks), {}
    for turn in range(plan.accumulation):
        for rank in range(ranks):
            part = rows(made.batch(step, plan.slots(World(rank, ranks, "cpu"), turn), "cpu"))
            assert not found.keys() & part.keys()
            found |= part
    return found


@pytest.mark.parametrize("data", [{}, {"flip": True}, {"crop": "random", "flip": True}], ids=str)
def test_draws_do_not_depend_on_ranks_and_micro_batches(data):
    for step in (0, 5):
        whole = drawn(bank(**data), step, 1, BATCH)
        assert sorted(whole) == list(range(2 * BATCH))
        for ranks, micro in ((1, 1), (1, 4), (2, 4), (2, 1), (4, 2), (8, 1)):
            assert drawn(bank(**data), step, ranks, micro) == whole


def test_draws_need_no_history():
    fresh, used = bank(flip=True, crop="random"), bank(flip=True, crop="random")
    for step in range(4):
        used.batch(step, range(BATCH), "cpu")
    assert rows(fresh.batch(9, range(BATCH), "cpu")) == rows(used.batch(9, range(BATCH), "cpu"))
    assert rows(fresh.batch(9, range(BATCH), "cpu")) != rows(fresh.batch(8, range(BATCH), "cpu"))


def test_which_sample_is_the_order_of_its_role():
    """Every sample exactly once an epoch, and the roles shuffled apart from each other."""
    made = bank()
    for role, count in ((Role.INSTANCE, 3), (Role.PRIOR, 5)):
        pictures = [to_pixels(square(open_photo(item.sample.image), 32)).numpy().tobytes() for item in made.items[role]]
        picked = []
        for step in range(15):
            batch = made.batch(step, range(BATCH), "cpu")
            picked += [
                pictures.index(batch.images_BCHW[i].numpy().tobytes()) for i in torch.where(batch.role_B == role)[0]
            ]
        assert picked == order(count, 0, 15 * BATCH, 0, "rex", role)
        epochs = [picked[i : i + count] for i in range(0, len(picked) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_roles_captions_and_slots_travel_together():
    made = bank()
    batch = made.batch(0, range(2, 5), "cpu")
    assert batch.slot_B.tolist() == [2, 3, 4, BATCH + 2, BATCH + 3, BATCH + 4]
    assert batch.role_B.tolist() == [0, 0, 0, 1, 1, 1]
    assert [made.texts[i] for i in batch.caption_B] == ["a photo of srx dog"] * 3 + ["a photo of a dog"] * 3
    assert bank(priors=False).batch(0, range(3), "cpu").role_B.tolist() == [0, 0, 0]


def test_subjects_and_seeds_draw_apart():
    base = rows(bank(flip=True).batch(0, range(BATCH), "cpu"))
    assert rows(bank(flip=True, subject="tom").batch(0, range(BATCH), "cpu")) != base
    assert rows(bank(flip=True, seed=1).batch(0, range(BATCH), "cpu")) != base


def test_flips_are_mirror_images_of_about_half():
    plain, flipped = bank(), bank(flip=True)
    mirrored = 0
    for step in range(20):
        one, two = (made.batch(step, range(BATCH), "cpu").images_BCHW for made in (plain, flipped))
        for a, b in zip(one, two):
            same = torch.equal(a, b)
            assert same or torch.equal(a.flip(-1), b)
            mirrored += not same
    count = 20 * 2 * BATCH
    assert abs(mirrored - count / 2) < 4 * (count / 4) ** 0.5  # four standard deviations of a fair coin


def test_random_crops_are_windows_of_the_resized_photo_and_reach_both_ends():
    made = bank(priors=False, crop="random")
    offsets = set()
    for step in range(25):
        batch = made.batch(step, range(BATCH), "cpu")
        pick = order(3, step * BATCH, BATCH, 0, "rex", Role.INSTANCE)
        for pixels, number, size in zip(batch.images_BCHW, pick, batch.size_B6.tolist()):
            resized = np.asarray(open_photo(made.items[Role.INSTANCE][number].sample.image).resize((38, 32), 1))
            top, left = int(size[2]), int(size[3])
            assert torch.equal(pixels, to_pixels(resized[top : top + 32, left : left + 32]))
            offsets.add((top, left))
    assert offsets == {(0, left) for left in range(7)}


def test_sizes_are_original_crop_and_target():
    """SDXL's six numbers: the photo's own size, the crop in the resized photo, the training size."""
    sizes = bank().batch(0, range(BATCH), "cpu").size_B6
    assert {tuple(row) for row in sizes[:BATCH].tolist()} == {(40.0, 48.0, 0.0, 3.0, 32.0, 32.0)}
    assert {tuple(row) for row in sizes[BATCH:].tolist()} == {(64.0, 40.0, 10.0, 0.0, 32.0, 32.0)}


def test_cached_moments_give_the_uncached_losses():
    """The encoder sees one image at a time when caching and a batch otherwise: fp32 sums in another order, 1e-5."""
    config = small_config("data.flip=true", "train.batch=4")
    with rig(config) as made:
        module, cached = made.engine.deepspeed.module, made.bank
        uncached = make_bank(config)
        assert cached.moments and not uncached.moments
        for step in range(3):
            got, want = (module(one.batch(step, range(4), "cpu"), step) for one in (cached, uncached))
            assert got.per_sample_B.tolist() == pytest.approx(want.per_sample_B.tolist(), rel=1e-5)
            assert got.per_sample_B.unique().numel() == 8


def test_cached_mirror_images_are_encoded_mirror_images():
    from dbtrain.families import FAMILIES
    from dbtrain.models.family import encode_images
    from dbtrain.models.load import load_models
    from dbtrain.settings.config import ModelConfig
    from tests.kit.main_job import sd_folder

    models = load_models(FAMILIES["sd"], ModelConfig(path=str(sd_folder())))
    made = bank(priors=False, flip=True)
    made.cache(Role.INSTANCE, (32, 32), FAMILIES["sd"].codec, models.vae, "cpu")
    array = square(open_photo(made.items[Role.INSTANCE][1].sample.image), 32)
    with torch.no_grad():
        want = encode_images(models.vae, torch.stack([to_pixels(array), to_pixels(flip(array))]))
    torch.testing.assert_close(made.moments[Role.INSTANCE, (32, 32)][1], want, rtol=1e-4, atol=1e-5)
    assert made.moments[Role.INSTANCE, (32, 32)].shape == (3, 2, 8, 16, 16)


def masked_bank(**data) -> Bank:
    """A bank whose photos but the last have their own red channel as their mask: a ramp, from left to right in a wide
    photo, from top to bottom in a tall one."""
    made = bank(mask_floor=0.25, **data)
    items = made.items[Role.INSTANCE]
    photos = (picture(), picture().transpose(Image.Transpose.TRANSPOSE))
    samples = [replace(sample(i), image=png(one), mask=png(one.getchannel("R"))) for i, one in enumerate(photos)]
    items = [*(Item(one, items[0].caption) for one in samples), items[2]]
    return Bank(made.items | {Role.INSTANCE: items}, made.data, 0, "rex", BATCH, 8)


@pytest.mark.parametrize("data", [{}, {"flip": True}, {"crop": "random"}, {"crop": "random", "flip": True}], ids=str)
def test_masks_follow_crop_and_mirror_of_their_photo(data):
    """A mask that is the photo's red channel must be the red channel of what is trained; priors have 1."""
    made = masked_bank(**data)
    for step in range(6):
        batch = made.batch(step, range(BATCH), "cpu")
        picked = order(3, step * BATCH, BATCH, 0, "rex", Role.INSTANCE)
        assert batch.mask_B1HW.shape == (2 * BATCH, 1, 4, 4) and (batch.mask_B1HW[BATCH:] == 1).all()
        red = torch.nn.functional.avg_pool2d((batch.images_BCHW[:BATCH, :1] + 1) / 2, 8)
        want = 0.25 + 0.75 * red
        want[torch.tensor(picked) == 2] = 1
        # The photo is resized by Lanczos and its mask linearly: a grey level or two apart in a smooth picture.
        torch.testing.assert_close(batch.mask_B1HW[:BATCH], want, rtol=0, atol=0.012)


def test_masks_change_nothing_else_of_a_draw_and_photos_without_have_none():
    plain, made = bank().batch(3, range(BATCH), "cpu"), masked_bank().batch(3, range(BATCH), "cpu")
    assert plain.mask_B1HW is None
    for name in ("caption_B", "role_B", "slot_B"):
        assert torch.equal(getattr(plain, name), getattr(made, name)), name
    joined = join_batches([plain, made])
    assert torch.equal(joined.mask_B1HW[: 2 * BATCH], torch.ones(2 * BATCH, 1, 4, 4))
    assert torch.equal(joined.mask_B1HW[2 * BATCH :], made.mask_B1HW)


def captioned(dropout=0.0, priors=True) -> Bank:
    """Photos with a caption each."""
    items = {Role.INSTANCE: [Item(sample(i), f"srx dog number {i}") for i in range(5)]}
    if priors:
        items[Role.PRIOR] = [Item(sample(i, Role.PRIOR), "a photo of a dog") for i in range(5)]
    return Bank(items, DataConfig(resolution=32, caption_dropout=dropout), 0, "rex", BATCH)


def test_each_photo_trains_under_its_own_caption():
    made = captioned()
    pictures = [to_pixels(square(open_photo(item.sample.image), 32)) for item in made.items[Role.INSTANCE]]
    assert len(made.texts) == 6
    for step in range(3):
        batch = made.batch(step, range(BATCH), "cpu")
        for image, row in zip(batch.images_BCHW[:BATCH], batch.caption_B[:BATCH]):
            number = next(i for i, one in enumerate(pictures) if torch.equal(one, image))
            assert made.texts[row] == f"srx dog number {number}"


def test_dropped_captions_are_a_share_of_the_photos_by_their_slots_alone():
    plain, made = captioned(), captioned(0.25)
    assert made.texts == [*plain.texts, ""]
    dropped = 0
    for step in range(100):
        one, two = (bank.batch(step, range(BATCH), "cpu") for bank in (plain, made))
        empty = two.caption_B == made.texts.index("")
        assert torch.equal(one.caption_B[~empty], two.caption_B[~empty]) and not empty[BATCH:].any()
        assert torch.equal(one.images_BCHW, two.images_BCHW)
        dropped += int(empty.sum())
        half = made.batch(step, range(4, BATCH), "cpu")
        assert torch.equal(half.caption_B[:4], two.caption_B[4:BATCH])
    assert 0.2 < dropped / (100 * BATCH) < 0.3
