"""A user's own class images: checked, imported once, under digests, and never mixed with drawn ones."""

import shutil

import pytest
from PIL import Image

from dbtrain.errors import DataError
from dbtrain.priors.draw import make_priors
from dbtrain.priors.own_images import import_images
from dbtrain.priors.store import (
    images_digest,
    imported_key,
    list_store,
    prior_key,
    read_priors,
    store_damage,
)
from dbtrain.values import Role
from tests.kit.class_images import ALONE, CONFIG, FAMILY
from tests.kit.forked import dbtrain
from tests.kit.main_job import inside, photo, small_config, write_job


def test_own_images_are_imported_once_and_grow(tmp_path, photos):
    assert import_images(photos, "dog", tmp_path / "store", CONFIG) == (5, 5)
    assert import_images(photos, "dog", tmp_path / "store", CONFIG) == (0, 5)
    for number in range(5, 20):
        photo(number).save(photos / f"{number}.jpg")
    (photos / "copy.jpg").write_bytes((photos / "3.jpg").read_bytes())
    assert import_images(photos, "dog", tmp_path / "store", CONFIG) == (15, 20)
    key = imported_key(CONFIG, "dog")
    samples = read_priors(tmp_path / "store", key, 20)
    assert len({one.meta["source_sha256"] for one in samples}) == 20
    assert all(one.caption == "a photo of a dog" and one.role == Role.PRIOR for one in samples)
    assert store_damage(tmp_path / "store") == []
    (row,) = list_store(tmp_path / "store")
    assert (row["sampler"], row["images"], row["model"]) == ("imported", 20, "")
    assert images_digest(tmp_path / "store", key, 5) != images_digest(tmp_path / "store", key, 6)


def test_damage_to_imported_images_says_to_import_them_again_and_that_helps(tmp_path, photos, models):
    """Nothing can draw them anew. What comes after the gap is kept."""
    store, config = tmp_path / "store", small_config("prior.sampler=imported")
    for count in (5, 20):
        for number in range(count):
            photo(number).save(photos / f"{number}.jpg")
        import_images(photos, "dog", store, config)
    key = prior_key(config, models, "dog")
    before = [one.image for one in read_priors(store, key, 20)]
    block = store / key.name / "block-000005-011"
    tar = block / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-3000])
    told = "delete this folder and run `dbtrain prior import` again"
    assert store_damage(store) and all(line.endswith(told) for line in store_damage(store))
    for read in (
        lambda: read_priors(store, key, 20),
        lambda: make_priors(store, key, 20, FAMILY, models, ALONE, 8),
        lambda: import_images(photos, "dog", store, config),
    ):
        with pytest.raises(DataError, match=f"{block}: .*; {told}"):
            read()
    shutil.rmtree(block)
    (line,) = store_damage(store)
    assert "block-000016-004: does not follow" in line and "`dbtrain prior import` of the lost images fills" in line
    photo(99).save(photos / "99.jpg")
    assert import_images(photos, "dog", store, config) == (12, 21)
    after = [one.image for one in read_priors(store, key, 21)]
    assert sorted(after[:20]) == sorted(before) and after[16:20] == before[16:20]
    assert store_damage(store) == []


def test_a_bad_photo_imports_nothing(tmp_path, photos):
    (photos / "bad.png").write_bytes(b"not a photo")
    with pytest.raises(DataError, match=r"bad.png: .*is no JPEG, PNG or WebP photo"):
        import_images(photos, "dog", tmp_path / "store", CONFIG)
    assert not (tmp_path / "store").exists()


def test_too_few_imported_images_are_said_so(tmp_path, photos, models):
    import_images(photos, "dog", tmp_path / "store", CONFIG)
    config = small_config("prior.sampler=imported")
    key = prior_key(config, models, "dog")
    assert make_priors(tmp_path / "store", key, 5, FAMILY, models, ALONE, 8) == 0
    with pytest.raises(DataError, match="has 5 sound imported images .*, want 6; bring more"):
        make_priors(tmp_path / "store", key, 6, FAMILY, models, ALONE, 8)


@pytest.mark.slow
def test_training_uses_imported_images_and_refuses_to_mix_them_with_others(tmp_path, photos):
    words = write_job(tmp_path / "job", "train.steps=2", "sample.images=0", subjects="rex:dog")
    store, out = tmp_path / "store", tmp_path / "out"
    bring = ("prior", "import", photos, "--class", "dog", "--config", "tiny", "--out", store, "data.resolution=32")
    assert inside(bring).exit_code == 0
    own = ("prior.sampler=imported", f"prior.store={store}", "prior.images=5")
    done = dbtrain(["train", *words, *own, "--subject", "rex", "--out", out])
    assert done.returncode == 0, done.stderr
    assert len(list(store.rglob("latents/*.safetensors"))) == 1
    Image.open(photos / "0.jpg").rotate(90).save(photos / "0.jpg")
    shutil.rmtree(store)
    assert inside(bring).exit_code == 0
    other = inside(["train", *words, *own, "--subject", "rex", "--out", out])
    assert other.exit_code == 3 and "other settings or data" in other.stderr
