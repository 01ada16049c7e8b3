import dataclasses
import hashlib

import numpy as np
import pytest

from dbtrain.data import images
from dbtrain.data.index import INDEX_NAME, Index
from dbtrain.data.shards import MARK, write_shards
from dbtrain.data.stream import read_samples, verify
from dbtrain.errors import DataError
from dbtrain.settings.config import DataConfig, RunConfig
from dbtrain.subjects.manifest import read_manifest, scan_manifest
from dbtrain.subjects.sharding import photo_samples, shard_subjects
from dbtrain.values import Role, Subject
from tests.faults.campaigns import disturb
from tests.kit.made_photos import make_samples

CONFIG = RunConfig(data=DataConfig(resolution=32))


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def manifest(photo_folder):
    path = photo_folder / "m.csv"
    path.write_text("subject,class,images\ncat,cat,cat\ntiger,big cat,tiger\n")
    return path


def test_equal_input_gives_equal_bytes(shard_folder, tmp_path):
    write_shards(make_samples(), tmp_path / "new" / "folder", max_bytes=10_000)
    assert digests(tmp_path / "new" / "folder") == digests(shard_folder)


def test_shards_keep_their_size_and_may_split_a_subject(shard_folder):
    index = Index.load(shard_folder)
    assert all(shard.size <= 10_000 for shard in index.shards)
    assert sum(shard.count for shard in index.shards) == len(index.entries) == 12
    assert all((shard_folder / shard.name).stat().st_size == shard.size for shard in index.shards)


def test_one_sample_above_the_limit_gets_its_own_shard(tmp_path):
    assert [shard.count for shard in write_shards(make_samples(1, 3), tmp_path / "o", max_bytes=1).shards] == [1, 1, 1]


def test_photo_samples_carry_pixels_and_provenance(manifest):
    cat, tiger = read_manifest(manifest)
    samples = list(photo_samples(cat, 32))
    assert [sample.key for sample in samples] == ["cat-0-0", "cat-0-1", "cat-0-2"]
    assert [sample.meta["source"] for sample in samples] == ["p1.png", "p2.PNG", "p10.png"]
    for sample, path in zip(samples, cat.images, strict=True):
        assert sample.meta["source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (sample.meta["width"], sample.meta["height"], sample.meta["class"]) == (48, 40, "cat")
        stored, photo = images.open_photo(sample.image), images.open_photo(path)
        assert min(stored.size) == 32
        np.testing.assert_array_equal(images.square(stored, 32), images.square(photo, 32))
    (only,) = photo_samples(tiger, 4096)
    assert images.open_photo(only.image).size == (48, 40)


def test_sharding_again_changes_nothing_and_says_so(manifest, tmp_path):
    out, said = tmp_path / "out", []
    index = shard_subjects(*scan_manifest(manifest), out, CONFIG, said.append)
    assert [sample.subject for sample in read_samples(out, index.entries)] == ["cat"] * 3 + ["tiger"]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert shard_subjects(*scan_manifest(manifest), out, CONFIG, said.append) == index
    assert "nothing to do" in said[-1]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_damage_is_remade(manifest, tmp_path):
    out, said = tmp_path / "out", []
    shard_subjects(*scan_manifest(manifest), out, CONFIG, said.append)
    sound = digests(out)
    (out / "train-000000.tar").write_bytes(b"damaged")
    shard_subjects(*scan_manifest(manifest), out, CONFIG, said.append)
    assert any("remaking" in line for line in said)
    assert digests(out) == sound


def test_other_input_is_refused(manifest, tmp_path):
    out = tmp_path / "out"
    shard_subjects(*scan_manifest(manifest), out, CONFIG, str)
    sound = digests(out)
    with pytest.raises(DataError, match="other photos, captions or another resolution"):
        shard_subjects(*scan_manifest(manifest), out, RunConfig(data=DataConfig(resolution=40)), str)
    photo = next((manifest.parent / "cat").iterdir())
    photo.write_bytes((manifest.parent / "tiger" / "a.jpg").read_bytes())
    with pytest.raises(DataError, match="other photos"):
        shard_subjects(*scan_manifest(manifest), out, CONFIG, str)
    assert digests(out) == sound


def test_folders_with_other_content_are_refused_and_untouched(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"mine")
    for remake, extra in ((False, ()), (True, ("notes.txt",))):
        for name in extra:
            (tmp_path / name).write_bytes(b"mine too")
        before = digests(tmp_path)
        with pytest.raises(DataError, match="is not empty"):
            write_shards(make_samples(), tmp_path, remake=remake)
        assert digests(tmp_path) == before


def test_bad_photos_are_all_named_before_anything_is_written(manifest, tmp_path):
    (manifest.parent / "cat" / "p1.png").write_bytes(b"")
    (manifest.parent / "tiger" / "a.jpg").write_bytes(b"BM")
    with pytest.raises(DataError) as caught:
        shard_subjects(*scan_manifest(manifest), tmp_path / "out", CONFIG, str)
    first, second = str(caught.value).splitlines()
    assert "p1.png: subject cat: is empty" in first
    assert "a.jpg: subject tiger: is no JPEG" in second
    assert not (tmp_path / "out").exists()


def change(number, **values):
    samples = list(make_samples())
    samples[number] = dataclasses.replace(samples[number], **values)
    return samples


WRONG = {
    "nothing": [],
    "repeated": change(1, key="cat-0-0-0"),
    "dotted": change(1, key="v1.0-0-0"),
    "other subject's key": change(1, key="cat-1-0-9"),
    "leading zero": change(1, key="cat-0-0-01"),
    "role at odds": change(1, role=Role.PRIOR),
    "unsafe subject": change(0, subject="../x", key="../x-0-0"),
    "pickle": change(1, extension="pickle"),
    "apart": [*make_samples(2, 1), *list(make_samples(1, 2))[1:]],
}


@pytest.mark.parametrize("name", WRONG)
def test_samples_that_no_reader_would_keep_apart_are_refused_and_nothing_stays(tmp_path, name):
    with pytest.raises(DataError):
        write_shards(WRONG[name], tmp_path / "out", max_bytes=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_photo_lost_meanwhile_is_named(manifest):
    subject = Subject("cat", "cat", (manifest.parent / "none.png",))
    with pytest.raises(DataError, match="none.png: cannot be read"):
        list(photo_samples(subject, 32))


def test_a_second_writer_is_refused(tmp_path):
    def samples():
        yield from make_samples(1)
        with pytest.raises(DataError, match="another process is writing"):
            write_shards(make_samples(), tmp_path)

    write_shards(samples(), tmp_path)
    assert verify(tmp_path) == []


def test_killed_at_every_file_operation_the_same_call_gives_the_same_folder(tmp_path):
    out = tmp_path / "root" / "out"

    def work():
        if (out / MARK).exists() or not (out / INDEX_NAME).exists():
            write_shards(make_samples(), out, max_bytes=10_000)
        assert verify(out) == []

    tally = disturb("shards", work, tmp_path / "root", "kill")
    assert tally.wrong == []
    assert tally.cases >= 20
