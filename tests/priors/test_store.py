"""The prior store: keys that name everything, blocks and encoded images under digests, damage that is named."""

import shutil
from dataclasses import fields, replace

import pytest
import torch

from dbtrain.errors import DataError
from dbtrain.priors.draw import make_priors
from dbtrain.priors.store import (
    BLOCK,
    PriorKey,
    list_store,
    prior_key,
    prior_moments,
    read_priors,
    store_damage,
)
from dbtrain.storage import kept_tensors
from tests.kit.class_images import ALONE, FAMILY
from tests.kit.main_job import small_config


def test_the_key_names_everything_that_decides_the_images(key):
    other = {str: "x", int: 77, float: 0.5}
    names = {key.name}
    for field in fields(PriorKey):
        changed = replace(key, **{field.name: other[type(getattr(key, field.name))]})
        names.add(changed.name)
    assert len(names) == 1 + len(fields(PriorKey))
    assert key.name.startswith("a-photo-of-a-dog-")


def test_every_setting_that_decides_the_images_is_in_the_key(models):
    key = prior_key(small_config(), models, "dog")
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
    assert prior_key(small_config(), models, "cat") != key
    for override in ("prior.images=9", "prior.batch=1", "prior.weight=0.5", "seed=3", "train.steps=9"):
        assert prior_key(small_config(override), models, "dog") == key, override


def test_damage_is_named_and_drawn_anew(tmp_path, models, key, store):
    shutil.copytree(store, tmp_path, dirs_exist_ok=True)
    want = [one.image for one in read_priors(store, key, BLOCK + 2)]
    tar = next((tmp_path / key.name).glob(f"block-{BLOCK:06d}-*/*.tar"))
    bad = bytearray(tar.read_bytes())
    bad[700] ^= 1
    tar.write_bytes(bad)
    assert all(tar.parent.name in line for line in store_damage(tmp_path))
    assert store_damage(tmp_path)
    with pytest.raises(DataError, match="run `dbtrain prior make` again, which draws it anew"):
        read_priors(tmp_path, key, BLOCK + 2)
    assert make_priors(tmp_path, key, BLOCK + 2, FAMILY, models, ALONE, 8) == 2
    assert [one.image for one in read_priors(tmp_path, key, BLOCK + 2)] == want
    assert store_damage(tmp_path) == []


def test_a_key_that_is_changed_is_named(tmp_path, key, store):
    shutil.copytree(store, tmp_path, dirs_exist_ok=True)
    path = tmp_path / key.name / "key.json"
    path.write_text(path.read_text().replace("a photo of a dog", "a photo of a cat"))
    assert "names other images than the folder" in store_damage(tmp_path)[0]
    path.unlink()
    assert "key.json: cannot be read" in store_damage(tmp_path)[0]


def test_other_folders_beside_blocks_are_no_blocks(tmp_path, models, key, store):
    """As a backup that a person made."""
    shutil.copytree(store, tmp_path, dirs_exist_ok=True)
    for name in ("block-000000-016.bak", "block-000000-0x6", "block-x", "block-000000-016-2", "block-000000-999 copy"):
        shutil.copytree(tmp_path / key.name / "block-000000-016", tmp_path / key.name / name)
    assert make_priors(tmp_path, key, BLOCK + 2, FAMILY, models, ALONE, 8) == 0
    assert list_store(tmp_path)[0]["images"] == len(read_priors(tmp_path, key, BLOCK + 2)) == BLOCK + 2
    assert store_damage(tmp_path) == []


def test_encoded_images_are_made_once_and_a_larger_set_adds_groups(tmp_path, key, store):
    samples = read_priors(store, key, BLOCK + 2)
    groups = []

    def encode(group):
        groups.append(len(group))
        return torch.stack([torch.full((2, 4, 4), float(hash(one.image) % 1000)) for one in group])

    first = prior_moments(tmp_path, key, samples[:BLOCK], {"device": "cpu"}, encode)
    assert groups == [BLOCK]
    grown = prior_moments(tmp_path, key, samples, {"device": "cpu"}, encode)
    again = prior_moments(tmp_path, key, samples, {"device": "cpu"}, encode)
    assert groups == [BLOCK, 2]
    assert torch.equal(grown, again) and torch.equal(grown[:BLOCK], first)
    prior_moments(tmp_path, key, samples, {"device": "cuda"}, encode)
    assert groups == [BLOCK, 2, BLOCK, 2]
    latents = tmp_path / key.name / "latents"
    for path in latents.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert len(kept_tensors.tensor_damage(latents)) == 4
    assert torch.equal(prior_moments(tmp_path, key, samples, {"device": "cpu"}, encode), grown)
    assert groups[-2:] == [BLOCK, 2] and len(kept_tensors.tensor_damage(latents)) == 2


def test_where_a_store_cannot_be_written_encoded_images_are_still_made(tmp_path, key, store, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(kept_tensors, "write_file", refuse)
    samples = read_priors(store, key, 2)
    made = prior_moments(tmp_path, key, samples, {}, lambda group: torch.ones(len(group), 3))
    assert made.shape == (2, 3)
