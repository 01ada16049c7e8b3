"""Where a photo's mask comes from, what is wrong with it, and that it is stored beside the photo."""

import numpy as np
import pytest
from PIL import Image

from dbtrain.data.images import open_photo
from dbtrain.data.index import Index
from dbtrain.data.masks import open_mask
from dbtrain.data.stream import read_samples, verify
from dbtrain.errors import DataError
from dbtrain.settings.config import DataConfig, RunConfig
from dbtrain.subjects.finding import defects
from dbtrain.subjects.manifest import read_manifest, scan_manifest
from dbtrain.subjects.masks import open_with_mask
from dbtrain.subjects.preflight import preflight
from dbtrain.subjects.sharding import shard_subjects, source_digest, source_lines
from dbtrain.values import Subject
from tests.kit.made_photos import jpeg, mask_of, picture, png

CONFIG = RunConfig(data=DataConfig(resolution=32))


def cut_out(mask: Image.Image) -> bytes:
    """A photo that is transparent where a mask is black."""
    photo = picture()
    photo.putalpha(mask)
    return png(photo)


@pytest.fixture
def folder(tmp_path):
    """A photo with a mask beside it, one that is a cut-out, one without a mask; and a photo of a mask."""
    (tmp_path / "rex").mkdir()
    files = {"a.jpg": jpeg(picture()), "a-mask.png": png(mask_of()), "b.png": cut_out(mask_of(left=24))}
    files |= {"c.png": png(picture()), "carnival-mask.png": png(picture(seed=1))}
    for name, content in files.items():
        (tmp_path / "rex" / name).write_bytes(content)
    (tmp_path / "m.csv").write_text("subject,class,images\nrex,dog,rex\n")
    return tmp_path


def one(folder, **cells):
    """The subject of a manifest of one row."""
    cells = {"subject": "rex", "class": "dog", "images": "rex", **cells}
    (folder / "m.csv").write_text(f"{','.join(cells)}\n{','.join(cells.values())}\n")
    return read_manifest(folder / "m.csv")[0]


def wrong(subject, config):
    """The defects of a subject. Its photos show the same, which is a note."""
    return defects(preflight([subject], config))


def masks(subject, **data):
    """The masks of a subject's photos by the photos' names, as arrays; None without one."""
    opened = {path.name: open_with_mask(subject, path, path.read_bytes(), DataConfig(**data))[1]
              for path in subject.images}  # fmt: skip
    return {name: None if mask is None else np.asarray(mask) for name, mask in opened.items()}


def test_a_mask_is_found_beside_the_photo_or_in_its_transparency(folder):
    found = masks(one(folder))
    assert list(found) == ["a.jpg", "b.png", "c.png", "carnival-mask.png"], "a mask of a photo is no photo"
    np.testing.assert_array_equal(found["a.jpg"], np.asarray(mask_of()))
    np.testing.assert_array_equal(found["b.png"], np.asarray(mask_of(left=24)))
    assert found["c.png"] is None and found["carnival-mask.png"] is None
    assert not any(mask is not None for mask in masks(one(folder), mask=False).values())
    assert list(masks(one(folder, images="rex/*.png"))) == ["b.png", "c.png", "carnival-mask.png"]
    assert list(masks(one(folder, images="rex/a.jpg;rex/a-mask.png"))) == ["a.jpg"]


def test_the_column_goes_before_what_is_beside_the_photo(folder):
    (folder / "masks").mkdir()
    for name, left in {"a": 5, "c-mask": 7}.items():
        (folder / "masks" / f"{name}.png").write_bytes(png(mask_of(left=left)))
    found = masks(one(folder, mask="masks"))
    np.testing.assert_array_equal(found["a.jpg"], np.asarray(mask_of(left=5)))
    np.testing.assert_array_equal(found["c.png"], np.asarray(mask_of(left=7)))
    np.testing.assert_array_equal(found["b.png"], np.asarray(mask_of(left=24)))
    single = masks(one(folder, images="rex/c.png", mask="rex/a-mask.png"))
    np.testing.assert_array_equal(single["c.png"], np.asarray(mask_of()))


def test_masks_of_no_photo_are_findings(folder):
    subject = one(folder, mask="rex/a-mask.png;rex/carnival-mask.png")
    (finding,) = wrong(subject, CONFIG)
    assert finding.file.endswith("carnival-mask.png") and "is a mask of none" in finding.what
    assert wrong(subject, CONFIG.replaced("data.mask", False)) == []
    for cell, what in {"nowhere": "does not exist", "m.csv": "m.csv"}.items():
        with pytest.raises(DataError, match=f"column mask: .*{what}.*a list of masks"):
            one(folder, mask=cell)


BAD = {
    "black": (png(mask_of(left=48)), "marks nothing that is trained"),
    "dim": (png(Image.new("L", (48, 40), 127)), "marks nothing that is trained"),
    "outside the crop": (png(Image.eval(mask_of(left=4), lambda value: 255 - value)), "marks nothing that is trained"),
    "other shape": (png(mask_of(40, 48)), "has 40x48 pixels, its photo has 48x40"),
    "torn": (png(mask_of())[:-30], "damaged or cut short"),
    "no picture": (b"<svg/>", "no JPEG, PNG or WebP"),
    "empty": (b"", "is empty"),
    "animated": (png(mask_of(), save_all=True, append_images=[mask_of(left=3)]), "animation of 2 frames"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_mask_is_a_finding_that_names_it_and_nothing_is_written(folder, name):
    content, what = BAD[name]
    (folder / "rex" / "a-mask.png").write_bytes(content)
    (finding,) = wrong(one(folder), CONFIG)
    assert finding.file == str(folder / "rex" / "a-mask.png") and what in finding.what and finding.remedy
    with pytest.raises(DataError, match="a-mask.png"):
        shard_subjects(*scan_manifest(folder / "m.csv"), folder / "shards", CONFIG, str)
    assert not (folder / "shards").exists()


def test_a_mask_is_empty_by_the_shape_that_is_trained(tmp_path):
    """Its top marks the subject: a square crop leaves that out, the shape of a portrait does not."""
    (tmp_path / "a.png").write_bytes(png(picture(48, 64)))
    top = np.zeros((64, 48), np.uint8)
    top[:7] = 255
    (tmp_path / "a-mask.png").write_bytes(png(Image.fromarray(top)))
    subject = Subject("rex", "dog", (tmp_path / "a.png",))
    square = RunConfig(data=DataConfig(resolution=256))
    (finding,) = wrong(subject, square)
    assert "marks nothing that is trained" in finding.what
    assert wrong(subject, square.replaced("data.buckets", True)) == []


def test_what_is_all_transparent_is_a_finding_of_the_photo(folder):
    (folder / "rex" / "b.png").write_bytes(cut_out(mask_of(left=48)))
    (finding,) = wrong(one(folder), CONFIG)
    assert finding.file == str(folder / "rex" / "b.png") and "marks nothing" in finding.what
    random = RunConfig(data=DataConfig(resolution=32, crop="random"))
    (folder / "rex" / "b.png").write_bytes(cut_out(Image.eval(mask_of(left=4), lambda value: 255 - value)))
    assert len(wrong(one(folder), CONFIG)) == 1 and wrong(one(folder), random) == []


def test_each_photo_can_be_asked_to_have_one(folder):
    strict = RunConfig(data=DataConfig(resolution=32, mask=True))
    found = wrong(one(folder), strict)
    assert [finding.file.rpartition("/")[2] for finding in found] == ["c.png", "carnival-mask.png"]
    assert all("has no mask" in finding.what for finding in found)
    (folder / "rex" / "c-mask.png").write_bytes(png(Image.new("L", (48, 40), 255)))
    assert wrong(one(folder, images="rex/a.jpg;rex/b.png;rex/c.png"), strict) == []


def test_masks_are_stored_beside_the_photos_and_fit_them(folder):
    index = shard_subjects(*scan_manifest(folder / "m.csv"), folder / "shards", CONFIG, str)
    assert [entry.masked for entry in index.entries] == [True, True, False, False]
    assert Index.load(folder / "shards") == index and verify(folder / "shards") == []
    stored = list(read_samples(folder / "shards", index.entries))
    for sample, left in zip(stored, (12, 24)):
        mask = np.asarray(open_mask(sample.mask))
        assert mask.shape[::-1] == open_photo(sample.image).size == (38, 32)
        assert mask[:, : round(left * 38 / 48) - 1].max() == 0 and mask[:, round(left * 38 / 48) + 1 :].min() == 255
    said: list[str] = []
    assert shard_subjects(*scan_manifest(folder / "m.csv"), folder / "shards", CONFIG, said.append) == index
    assert "nothing to do" in said[-1]


def test_other_masks_are_other_input(folder):
    def digest(**data):
        data = DataConfig(resolution=32, **data)
        return source_digest(source_lines([one(folder)], data), data)

    first, without = digest(), digest(mask=False)
    (folder / "rex" / "a-mask.png").write_bytes(png(mask_of(left=13)))
    assert len({first, without, digest()}) == 3 and digest(mask=False) == without
    (folder / "rex" / "a-mask.png").unlink()
    (folder / "rex" / "b.png").unlink()
    assert digest() == digest(mask=False), "photos without masks have the digest that they always had"


def test_ready_made_shards_without_masks_are_refused_where_each_photo_must_have_one(folder):
    shard_subjects(*scan_manifest(folder / "m.csv"), folder / "shards", CONFIG, str)
    ready = {"resolution": 32, "shards": str(folder / "shards"), "mask": True}
    with pytest.raises(DataError, match="rex: holds photos without a mask"):
        shard_subjects(*scan_manifest(folder / "m.csv", False), folder / "out", RunConfig(data=ready), str)
