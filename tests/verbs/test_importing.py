"""`dbtrain import`: a manifest of other tools' folders, and what was guessed."""

import json

from typer.testing import CliRunner

from dbtrain.cli import app
from tests.kit.main_job import photo


def run(*words):
    return CliRunner().invoke(app, ["import", *map(str, words)])


def folder_of_photos(place):
    place.mkdir(parents=True)
    for number in range(3):
        photo(number).save(place / f"{number}.png")
    return place


def test_kohyas_folders_become_a_manifest_and_the_guesses_are_printed(tmp_path):
    folder_of_photos(tmp_path / "train" / "10_zorbo gadget")
    done = run("kohya", tmp_path / "train", "--out", tmp_path / "manifest.jsonl")
    assert done.exit_code == 0, done.output
    row = json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[0])
    assert (row["class"], row["identifier"]) == ("gadget", "zorbo")
    assert "1 subjects" in done.output and "10" in done.output


def test_a_plain_folder_needs_its_class(tmp_path):
    photos = folder_of_photos(tmp_path / "rex")
    done = run("imagefolder", photos, "--class", "dog", "--out", tmp_path / "manifest.jsonl")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "manifest.jsonl").read_text())["class"] == "dog"


def test_a_store_needs_a_recipe(tmp_path):
    folder_of_photos(tmp_path / "train" / "10_zorbo gadget")
    done = run("kohya", tmp_path / "train", "--out", tmp_path / "m.jsonl", "--store", tmp_path / "priors")
    assert done.exit_code == 2 and "--store, --config: give both" in done.output
