"""One store, many runs: each image made once, own images brought in, encoded images kept, all of it under proof."""

import json
import os
import shutil
import signal
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.data.images import open_photo
from dbtrain.engines.world import World
from dbtrain.errors import DataError
from dbtrain.families import FAMILIES
from dbtrain.models.load import load_models
from dbtrain.priors.draw import make_priors
from dbtrain.priors.own_images import import_images
from dbtrain.priors.store import (
    BLOCK,
    images_digest,
    imported_key,
    list_store,
    prior_key,
    prior_moments,
    read_priors,
    store_damage,
)
from dbtrain.storage import kept_tensors
from dbtrain.storage.atomic import held
from tests.kit.main_job import dbtrain, photo, small_config, write_job

ALONE = World(0, 1, "cpu")
FAMILY = FAMILIES["sd"]
CONFIG = small_config("prior.steps=1")


@pytest.fixture(scope="module")
def models():
    return load_models(FAMILY, CONFIG.model)


@pytest.fixture(scope="module")
def key(models):
    return prior_key(CONFIG, models, "dog")


@pytest.fixture(scope="module")
def store(tmp_path_factory, models, key):
    """A sound store of two blocks; copy it before doing harm."""
    folder = tmp_path_factory.mktemp("store")
    assert make_priors(folder, key, BLOCK + 2, FAMILY, models, ALONE, 8) == BLOCK + 2
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "dogs"
    folder.mkdir()
    for number in range(5):
        photo(number).save(folder / f"{number}.jpg")
    return folder


def drawing_child(store, key, images, models, log, first_pause_s=0.0):
    """A forked process that makes priors and logs the number of each image it draws."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        draw = store._draw

        def logged(pipeline, key, block, batch):
            for number, sample in zip(block, draw(pipeline, key, block, batch)):
                with open(log, "a") as file:
                    file.write(f"{os.getpid()} {number}\n")
                if number == 0:
                    time.sleep(first_pause_s)
                yield sample

        store._draw = logged
        make_priors(store, key, images, FAMILY, models, ALONE, 4)
        assert len(read_priors(store, key, images)) == images
        code = 0
    finally:
        os._exit(code)


def pixels(store, key, images):
    return [np.asarray(open_photo(one.image)).astype(int) for one in read_priors(store, key, images)]


def test_two_runs_at_once_make_each_image_once(tmp_path, models, key, store):
    log, images = tmp_path / "log", BLOCK + 2
    children = [drawing_child(tmp_path / "store", key, images, models, log, 0.5) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    drawn = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(number) for _, number in drawn) == list(range(images))
    assert len({pid for pid, _ in drawn}) == 2
    # The children draw by fours, the store by eights: batched matrix products round differently, by a level at most.
    for want, got in zip(*(pixels(place, key, images) for place in (store, tmp_path / "store")), strict=True):
        assert np.abs(want - got).max() <= 1


def test_a_waiting_run_takes_over_from_a_killed_one(tmp_path, models, key):
    log = tmp_path / "log"
    killed = drawing_child(tmp_path / "store", key, 2, models, log, 60)
    while not log.exists():
        time.sleep(0.01)
    said = []
    waiting = os.fork()
    if waiting == 0:
        code = 1
        try:
            make_priors(tmp_path / "store", key, 2, FAMILY, models, ALONE, 4, said.append)
            code = 0 if any("being drawn by another run; waiting" in line for line in said) else 7
        finally:
            os._exit(code)
    time.sleep(0.5)
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(waiting, 0)[1]) == 0
    assert len(read_priors(tmp_path / "store", key, 2)) == 2
    assert store_damage(tmp_path / "store") == []


def test_drawing_and_waiting_for_another_run_show_life(tmp_path, models, key):
    """A fleet ends who is silent for long, and a block can take longer than that."""
    drawn: list[int] = []
    make_priors(tmp_path / "alone", key, 3, FAMILY, models, ALONE, 1, beat=lambda: drawn.append(1))
    assert len(drawn) >= 3
    beats: list[int] = []
    other = ExitStack()
    assert other.enter_context(held(tmp_path / key.name / ".block-000000.lock"))

    def beat():
        beats.append(1)
        if len(beats) == 4:
            other.close()

    assert make_priors(tmp_path, key, 3, FAMILY, models, ALONE, 8, beat=beat) == 3
    assert len(beats) >= 4 + 3


def test_a_request_to_stop_is_met_between_blocks(tmp_path, models, key):
    asked = iter([False, True])
    drawn = make_priors(tmp_path, key, 2 * BLOCK, FAMILY, models, ALONE, 8, stop=lambda: next(asked))
    assert drawn == BLOCK
    assert make_priors(tmp_path, key, BLOCK, FAMILY, models, ALONE, 8) == 0


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
    assert all(one.caption == "a photo of a dog" and one.role == store.Role.PRIOR for one in samples)
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


def test_other_folders_beside_blocks_are_no_blocks(tmp_path, models, key, store):
    """As a backup that a person made."""
    shutil.copytree(store, tmp_path, dirs_exist_ok=True)
    for name in ("block-000000-016.bak", "block-000000-0x6", "block-x", "block-000000-016-2", "block-000000-999 copy"):
        shutil.copytree(tmp_path / key.name / "block-000000-016", tmp_path / key.name / name)
    assert make_priors(tmp_path, key, BLOCK + 2, FAMILY, models, ALONE, 8) == 0
    assert list_store(tmp_path)[0]["images"] == len(read_priors(tmp_path, key, BLOCK + 2)) == BLOCK + 2
    assert store_damage(tmp_path) == []


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


def run(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_the_verbs_list_verify_and_import(tmp_path, photos, store):
    assert "18 images of 32 px" in run("prior", "ls", store).stdout
    assert json.loads(run("prior", "ls", store, "--json").stdout)[0]["images"] == BLOCK + 2
    assert run("prior", "verify", store).stdout == f"{store}: sound\n"
    own = tmp_path / "own"
    words = ("prior", "import", photos, "--class", "dog", "--config", "tiny", "--out", own, "data.resolution=32")
    assert "dog: 5 images imported, 5 in the store" in run(*words).stdout
    tar = next(own.rglob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1])
    bad = run("prior", "verify", own, "--json")
    assert bad.exit_code == 3 and len(json.loads(bad.stdout)) == 1
    assert run("prior", "ls", tmp_path / "none").exit_code == 3


@pytest.mark.slow
def test_training_uses_imported_images_and_refuses_to_mix_them_with_others(tmp_path, photos):
    words = write_job(tmp_path / "job", "train.steps=2", "sample.images=0", subjects="rex:dog")
    store, out = tmp_path / "store", tmp_path / "out"
    bring = ("prior", "import", photos, "--class", "dog", "--config", "tiny", "--out", store, "data.resolution=32")
    assert run(*bring).exit_code == 0
    own = ("prior.sampler=imported", f"prior.store={store}", "prior.images=5")
    done = dbtrain(["train", *words, *own, "--subject", "rex", "--out", out])
    assert done.returncode == 0, done.stderr
    assert len(list(store.rglob("latents/*.safetensors"))) == 1
    Image.open(photos / "0.jpg").rotate(90).save(photos / "0.jpg")
    shutil.rmtree(store)
    assert run(*bring).exit_code == 0
    other = dbtrain(["train", *words, *own, "--subject", "rex", "--out", out])
    assert other.returncode == 3 and "other settings or data" in other.stderr
