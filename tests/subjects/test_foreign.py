"""Folders of other tools as manifests, which train without another word."""

import json

import pytest

from dbtrain.errors import DataError
from dbtrain.priors.own_images import import_images
from dbtrain.settings.config import RunConfig
from dbtrain.subjects.foreign import Imported, from_imagefolder, from_kohya, import_class_images
from dbtrain.subjects.manifest import scan_manifest
from tests.kit.made_photos import picture, png

CONFIG = RunConfig.model_validate({"data": {"resolution": 32}})


def fill(folder, **photos):
    """Photos (seed) and texts by name in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in photos.items():
        path = folder / name.replace("_", ".")
        path.write_text(content) if isinstance(content, str) else path.write_bytes(png(picture(seed=content)))


@pytest.fixture
def kohya(tmp_path):
    root = tmp_path / "training"
    fill(root / "img" / "10_zorbo gadget", a_png=1, a_txt="zorbo gadget, on a shelf", b_png=2)
    fill(root / "img" / "5_zorbo gadget", c_png=3)
    fill(root / "img" / "20_ohwx stuffed [old] animal", d_png=4)
    fill(root / "reg" / "1_gadget", e_png=5, f_png=6)
    fill(root / "log", g_txt="not a folder of photos")
    return root


@pytest.mark.parametrize("place", ["", "img"])
def test_kohyas_folders_are_subjects_with_identifier_class_and_captions(kohya, tmp_path, place):
    imported = from_kohya(kohya / place)
    imported.write(tmp_path / "m.jsonl")
    subjects, findings = scan_manifest(tmp_path / "m.jsonl")
    assert not [one for one in findings if not one.note]
    found = {one.id: (one.class_noun, one.identifier, [photo.name for photo in one.images]) for one in subjects}
    assert found == {
        "ohwx": ("stuffed [old] animal", "ohwx", ["d.png"]),
        "zorbo": ("gadget", "zorbo", ["c.png", "a.png", "b.png"]),
    }
    assert sorted(next(one for one in subjects if one.id == "zorbo").captions) == ["", "", "zorbo gadget, on a shelf"]
    said = "\n".join(imported.said)
    assert "identifier 'zorbo', class 'gadget', 2 photos; 10 repeats" in said
    assert imported.class_images == ({"gadget": [kohya / "reg" / "1_gadget"]} if not place else imported.class_images)


def test_regularization_images_go_into_the_prior_store(kohya, tmp_path):
    imported = from_kohya(kohya)
    import_class_images(imported, lambda place, noun: import_images(place, noun, tmp_path / "store", CONFIG))
    assert imported.said[-1] == "class images of 'gadget': 2 imported, 2 in the store"


def test_a_folder_without_a_class_asks_for_one(tmp_path):
    fill(tmp_path / "img" / "7_zorbo", a_png=1)
    with pytest.raises(DataError, match="no class after the identifier; give --class"):
        from_kohya(tmp_path)
    assert from_kohya(tmp_path, "gadget").rows[0]["class"] == "gadget"


def test_an_imagefolder_is_a_subject_or_one_for_each_folder(tmp_path):
    fill(tmp_path / "set" / "train" / "red_car", a_png=1)
    fill(tmp_path / "set" / "train" / "dog", a_png=2, b_png=3)
    rows = from_imagefolder(tmp_path / "set").rows
    assert [(row["subject"], row["class"]) for row in rows] == [("dog", "dog"), ("red_car", "red car")]
    (row,) = from_imagefolder(tmp_path / "set" / "train" / "dog", "puppy").rows
    assert (row["subject"], row["class"]) == ("dog", "puppy")
    with pytest.raises(DataError, match="nothing says what its photos show; give --class"):
        from_imagefolder(tmp_path / "set" / "train" / "dog")


@pytest.mark.parametrize("maker", [from_kohya, from_imagefolder])
def test_folders_without_photos_are_refused_in_a_line(tmp_path, maker):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="; "):
            maker(place, "dog")


def test_ids_stay_apart_and_a_manifest_is_not_written_over(tmp_path):
    for name in ("a/x y", "b/x-y", "c/X_Y!"):
        fill(tmp_path / "set" / name, p_png=1)
    imported = from_imagefolder(tmp_path / "set", "dog")
    assert [row["subject"] for row in imported.rows] == ["x-y", "x-y-2", "X_Y"]
    imported.write(tmp_path / "m.jsonl")
    assert len([json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]) == 3
    with pytest.raises(DataError, match="is there already"):
        imported.write(tmp_path / "m.jsonl")
    with pytest.raises(DataError, match="as JSONL"):
        Imported().write(tmp_path / "m.csv")
