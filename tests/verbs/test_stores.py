"""The verbs of shards and class images, as a user types them."""

import json

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from tests.kit.main_job import photo, write_job


def run(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_shards_are_verified(tmp_path):
    job = write_job(tmp_path / "job")
    shards = tmp_path / "shards"
    assert run("shard", job[0], "--out", shards, "--config", job[2]).exit_code == 0
    sound = run("shard", "verify", shards)
    assert (sound.exit_code, sound.stdout) == (0, f"{shards}: sound\n")
    tar = shards / "train-000000.tar"
    bad = bytearray(tar.read_bytes())
    bad[700] ^= 1
    tar.write_bytes(bad)
    damaged = run("shard", "verify", shards)
    assert damaged.exit_code == 3
    assert "train-000000.tar" in damaged.stderr
    assert run("shard", job[0]).exit_code == 2


def test_priors_are_drawn_once_a_class(tmp_path):
    job = write_job(tmp_path / "job")
    store = tmp_path / "store"
    words = ("prior", job[0], "--out", store, "--config", job[2], job[3], "prior.images=2")
    assert run(*words).stdout.splitlines()[-2:] == [
        "cat: 2 images drawn, 2 in the store",
        "dog: 2 images drawn, 2 in the store",
    ]
    assert run(*words).stdout.splitlines()[-1] == "dog: 0 images drawn, 2 in the store"
    drawn = run("prior", "ls", store).stdout.splitlines()
    assert len(drawn) == 2 and all("2 images of 32 px" in line and "seed 0, model " in line for line in drawn)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "dogs"
    folder.mkdir()
    for number in range(3):
        photo(number).save(folder / f"{number}.jpg")
    return folder


def test_a_store_of_own_images_is_imported_listed_and_verified(tmp_path, photos):
    own = tmp_path / "own"
    words = ("prior", "import", photos, "--class", "dog", "--config", "tiny", "--out", own, "data.resolution=32")
    assert "dog: 3 images imported, 3 in the store" in run(*words).stdout
    listed = run("prior", "ls", own).stdout
    assert "3 images of 32 px" in listed and listed.rstrip().endswith("own images")
    assert json.loads(run("prior", "ls", own, "--json").stdout)[0]["images"] == 3
    assert run("prior", "verify", own).stdout == f"{own}: sound\n"
    tar = next(own.rglob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1])
    bad = run("prior", "verify", own, "--json")
    assert bad.exit_code == 3 and len(json.loads(bad.stdout)) == 1
    assert run("prior", "ls", tmp_path / "none").exit_code == 3
