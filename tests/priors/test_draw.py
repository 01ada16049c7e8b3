"""The prior store: each image made once, shared by all subjects of a class, named by everything that decides it."""

import io
import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from dbtrain.engines.world import World
from dbtrain.families import FAMILIES
from dbtrain.models.load import load_models
from dbtrain.models.sampling import generate, make_pipeline
from dbtrain.priors import store
from dbtrain.priors.draw import make_priors
from dbtrain.priors.store import BLOCK, PriorKey, missing_blocks, prior_key, read_priors
from tests.kit.main_job import small_config

ALONE = World(0, 1, "cpu")
FAMILY = FAMILIES["sd"]
CONFIG = small_config()


@pytest.fixture(scope="module")
def models():
    return load_models(FAMILY, CONFIG.model)


@pytest.fixture
def key(models):
    return prior_key(CONFIG, models, "dog")


def make(store, key, images, models, world=ALONE, batch=8, said=None) -> int:
    return make_priors(store, key, images, FAMILY, models, world, batch, (said if said is not None else []).append)


def digests(store) -> dict:
    return {path.relative_to(store): (path.stat().st_mtime_ns, path.read_bytes()) for path in store.rglob("*.*")}


def test_the_key_names_everything_that_decides_the_images(key):
    other = {str: "x", int: 77, float: 0.5}
    names = {key.name}
    for field in fields(PriorKey):
        changed = replace(key, **{field.name: other[type(getattr(key, field.name))]})
        names.add(changed.name)
    assert len(names) == 1 + len(fields(PriorKey))
    assert key.name.startswith("a-photo-of-a-dog-")


def test_every_setting_that_decides_the_images_is_in_the_key(models, key):
    for override in (
        "prior.sampler=ddpm",
        "prior.steps=3",
        "prior.guidance=2",
        "prior.seed=1",
        "data.resolution=48",
        "train.precision=bf16",
        "data.class_caption=an image of a {class}",
    ):
        assert prior_key(small_config(override), models, "dog") != key, override
    assert prior_key(CONFIG, models, "cat") != key
    for override in ("prior.images=9", "prior.batch=1", "prior.weight=0.5", "seed=3", "train.steps=9"):
        assert prior_key(small_config(override), models, "dog") == key, override


def test_a_class_is_made_once_and_grows_without_remaking(tmp_path, models, key):
    said: list[str] = []
    assert make(tmp_path, key, 5, models, said=said) == 5
    assert len(said) == 1
    first, before = read_priors(tmp_path, key, 5), digests(tmp_path)
    assert make(tmp_path, key, 5, models) == 0
    assert make(tmp_path, key, 3, models) == 0
    assert digests(tmp_path) == before
    assert [one.image for one in read_priors(tmp_path, key, 3)] == [one.image for one in first[:3]]
    assert make(tmp_path, key, 8, models) == 3
    after = digests(tmp_path)
    assert {path: after[path] for path in before if path.suffix == ".tar"} == {
        path: one for path, one in before.items() if path.suffix == ".tar"
    }
    grown = read_priors(tmp_path, key, 8)
    assert [one.image for one in grown[:5]] == [one.image for one in first]
    assert len({one.image for one in grown}) == len({one.key for one in grown}) == 8


def test_growing_gives_the_images_of_making_all_at_once(tmp_path, models, key):
    for images in (2, 5, BLOCK + 3):
        make(tmp_path / "grown", key, images, models, batch=1)
    make(tmp_path / "once", key, BLOCK + 3, models, batch=1)
    grown, once = (read_priors(tmp_path / name, key, BLOCK + 3) for name in ("grown", "once"))
    assert [one.image for one in grown] == [one.image for one in once]
    assert [one.key for one in grown] == [one.key for one in once]


def test_ranks_share_the_blocks(tmp_path, models, key, monkeypatch):
    """Each block by exactly one rank; no image depends on which."""
    drawn = []

    def draw(pipeline, key, block, batch):
        drawn.extend(block)
        for number in block:
            data = io.BytesIO()
            Image.new("RGB", (16, 16), (number, 0, 0)).save(data, "PNG")
            yield store.Sample(f"x-1-{number}", "x", store.Role.PRIOR, key.prompt, data.getvalue(), "png", {})

    monkeypatch.setattr(store, "_draw", draw)
    counts = [make(tmp_path, key, 3 * BLOCK + 1, models, World(rank, 3, "cpu")) for rank in range(3)]
    # The ranks come one after another here, so that later ones see the blocks of earlier ones.
    assert counts == [BLOCK + 1, BLOCK, BLOCK]
    assert not missing_blocks(tmp_path / key.name, 3 * BLOCK + 1)
    assert sorted(drawn) == list(range(3 * BLOCK + 1))
    found = [Image.open(io.BytesIO(one.image)).getpixel((0, 0))[0] for one in read_priors(tmp_path, key, 3 * BLOCK + 1)]
    assert found == list(range(3 * BLOCK + 1))


def test_images_do_not_depend_on_the_batch_they_are_drawn_in(tmp_path, models, key):
    """Own generators make equal noise; batched matrix products round differently, at most one level of 255."""
    made = {}
    for batch in (1, 4):
        make(tmp_path / str(batch), key, 4, models, batch=batch)
        samples = read_priors(tmp_path / str(batch), key, 4)
        made[batch] = np.stack([np.asarray(Image.open(io.BytesIO(one.image))) for one in samples]).astype(int)
    assert np.abs(made[1] - made[4]).max() <= 1
    assert np.abs(made[1][0] - made[1][1]).max() > 20


@pytest.mark.parametrize("sampler", ["ddpm", "euler_ancestral", "ddim"])
def test_ancestral_samplers_add_noise_as_they_go(models, sampler):
    """From one starting noise and two streams of later noise: ancestral samplers part, DDIM does not."""
    pipeline = make_pipeline(FAMILY, models, sampler)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    images = [
        pipeline(
            "a dog",
            latents=latents.clone(),
            generator=torch.Generator().manual_seed(seed),
            height=32,
            width=32,
            num_inference_steps=4,
            guidance_scale=1,
            output_type="np",
        ).images
        for seed in (1, 2)
    ]
    assert np.array_equal(*images) == (sampler == "ddim")


def test_a_seed_gives_an_image_whatever_came_before(models):
    pipeline = make_pipeline(FAMILY, models, "euler_ancestral")
    first, second = (
        [np.asarray(one) for one in generate(pipeline, ["a dog"] * 2, seeds, 32, 3, 1.0, batch=1)]
        for seeds in ((1, 2), (2, 1))
    )
    assert np.array_equal(first[0], second[1])
    assert np.array_equal(first[1], second[0])


def test_samples_say_where_they_come_from(tmp_path, models, key):
    make(tmp_path, key, 2, models)
    for number, one in enumerate(read_priors(tmp_path, key, 2)):
        assert one.role == store.Role.PRIOR and one.caption == "a photo of a dog"
        assert one.key.endswith(f"-1-{number}") and one.meta["seed"] > 0
    assert json.loads((tmp_path / key.name / "key.json").read_text())["prompt"] == "a photo of a dog"
