"""Photos of several shapes in a bank: each with its own crop, sizes and mask, and its prior in the same shape."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dbtrain.data.images import fit, open_photo, to_pixels
from dbtrain.data.index import order
from dbtrain.families import FAMILIES
from dbtrain.models.load import load_models
from dbtrain.settings.config import DataConfig, ModelConfig
from dbtrain.training.bank import Bank, Item
from dbtrain.values import Role
from tests.kit.made_photos import png
from tests.kit.main_job import rig, sample, sd_folder, small_config

BATCH = 4
SIZES = [(40, 64), (64, 40), (48, 48), (42, 64), (100, 30)]
"""Width and height of the photos."""
SHAPES = [(40, 24), (24, 40), (32, 32), (40, 24), (24, 40)]


def bank(subject="rex", **data) -> Bank:
    items = {Role.INSTANCE: [Item(sample(i, Role.INSTANCE, *size), "a") for i, size in enumerate(SIZES)]}
    items[Role.PRIOR] = [Item(sample(i, Role.PRIOR, 32, 32), "b") for i in range(7)]
    return Bank(items, DataConfig(resolution=32, buckets=True, **data), 0, subject, BATCH, 8)


def picked(role: Role, step: int, slot: int, subject="rex") -> int:
    return order(len(SIZES) if role == Role.INSTANCE else 7, step * BATCH + slot, 1, 0, subject, role)[0]


def test_a_photo_and_its_prior_have_the_photos_shape_and_sizes_and_the_order_of_squares():
    made = bank()
    assert made.shapes == SHAPES and made.kinds == ((40, 24), (24, 40), (32, 32))
    for step in range(4):
        for slot in range(BATCH):
            batch = made.batch(step, [slot], "cpu")
            photo, prior = (picked(role, step, slot) for role in Role)
            shape, (width, height) = SHAPES[photo], SIZES[photo]
            for n, image in enumerate((made.items[Role.INSTANCE][photo], made.items[Role.PRIOR][prior])):
                want = to_pixels(fit(open_photo(image.sample.image), shape))
                assert batch.images_BCHW[n].shape == (3, *shape) and torch.equal(batch.images_BCHW[n], want)
            scale = max(shape[0] / height, shape[1] / width)
            spare = [round(side * scale) - own for side, own in zip((height, width), shape)]
            assert batch.size_B6[0].tolist() == [height, width, *((room + 1) // 2 for room in spare), *shape]
            longer = max(shape)
            cut = [(longer - own + 1) // 2 for own in shape]
            assert batch.size_B6[1].tolist() == [32, 32, *cut, *shape]


@pytest.mark.parametrize("data", [{"flip": True}, {"crop": "random", "flip": True}], ids=str)
def test_caches_give_what_pixels_give(data):
    """Cached moments of every photo and prior, against the encoding of what an uncached bank draws."""
    models = load_models(FAMILIES["sd"], ModelConfig(path=str(sd_folder())))
    plain, cached, codec = bank(**data), bank(**data), FAMILIES["sd"].codec
    if cached.data.crop == "center":
        for shape in cached.kinds:
            for role in Role:
                cached.cache(role, shape, codec, models.vae, "cpu")
    for step in range(6):
        for slot in range(BATCH):
            want, got = (made.batch(step, [slot], "cpu") for made in (plain, cached))
            assert torch.equal(want.size_B6, got.size_B6)
            images = got.images_BCHW if codec.is_encoded(got.images_BCHW) else codec.encode(models.vae, got.images_BCHW)
            with torch.no_grad():
                wanted = codec.encode(models.vae, want.images_BCHW)
            torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-5)


def test_photos_of_unlike_shapes_are_no_batch_and_those_of_one_are():
    made = bank()
    with pytest.raises(ValueError, match="too many values"):
        made.batch(0, range(BATCH), "cpu")
    alike = bank("tom")
    alike.items[Role.INSTANCE] = [alike.items[Role.INSTANCE][0]] * 3
    alike = Bank(alike.items, alike.data, 0, "tom", BATCH, 8)
    assert alike.batch(0, range(BATCH), "cpu").images_BCHW.shape == (2 * BATCH, 3, 40, 24)


def test_masks_have_the_photos_shape():
    """A white mask with a black upper half, in a photo that keeps its height."""
    items = dict(bank().items)
    half = np.full((64, 40), 255, dtype=np.uint8)
    half[:32] = 0
    first = items[Role.INSTANCE][0]
    masked = replace(first, sample=replace(first.sample, mask=png(Image.fromarray(half))))
    items[Role.INSTANCE] = [masked, *items[Role.INSTANCE][1:]]
    made = Bank(items, DataConfig(resolution=32, buckets=True, mask_floor=0.0), 0, "rex", BATCH, 8)
    for step in range(4):
        for slot in range(BATCH):
            photo, batch = picked(Role.INSTANCE, step, slot), made.batch(step, [slot], "cpu")
            rows, columns = (side // 8 for side in SHAPES[photo])
            assert batch.mask_B1HW.shape == (2, 1, rows, columns) and (batch.mask_B1HW[1] == 1).all()
            if photo == 0:
                assert batch.mask_B1HW[0, 0].mean(1).tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=0.03)
            else:
                assert (batch.mask_B1HW[0] == 1).all()


def test_accumulated_shapes_have_the_gradient_of_one_by_one():
    """A step over photos of three shapes, each with its prior, against every sample alone, in float64: 1e-12."""
    config = small_config("data.buckets=true", f"train.batch={BATCH}", "data.cache_latents=false")
    with rig(config) as rigged:
        module = rigged.engine.deepspeed.module.double()
        module.vae.double()
        module.captions = module.captions.to(torch.float64)
        params = [param for param in module.parameters() if param.requires_grad]
        made = bank()

        def drawn(step, slot):
            batch = made.batch(step, [slot], "cpu")
            moments = module.family.codec.encode(module.vae, batch.images_BCHW.double())
            return replace(batch, images_BCHW=moments.double())

        for step in range(2):
            batches = [drawn(step, slot) for slot in range(BATCH)]
            assert len({batch.images_BCHW.shape for batch in batches}) > 1
            module.zero_grad()
            for batch in batches:
                module(batch, step).loss.backward()
            together = [param.grad.clone() for param in params]
            alone = [torch.zeros_like(param) for param in params]
            for batch in batches:
                for n in range(len(batch.slot_B)):
                    grads = torch.autograd.grad(module(batch[n : n + 1], step).loss, params)
                    alone = [total + grad for total, grad in zip(alone, grads)]
            largest = max(float(grad.abs().max()) for grad in alone)
            assert largest > 1e-6
            for one, other in zip(together, alone):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 * largest)
