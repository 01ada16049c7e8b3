"""The photos that a subject is compared with: from where training read them, by an index that is loaded once."""

import shutil

import fsspec
import pytest

from dbtrain.data.index import INDEX_NAME, Index
from dbtrain.errors import DataError
from dbtrain.evaluate.photos import read_photos
from tests.kit.main_job import small_config


@pytest.fixture
def out(trained, tmp_path):
    """A copy of the finished run's shards."""
    shutil.copytree(trained / "shards", tmp_path / "out" / "shards")
    return tmp_path / "out"


def test_photos_come_from_the_shards_that_were_trained_on(out):
    """Ready-made shards at an address, as `data.shards` of the run or of the command; a folder that is named wins."""
    bucket, folder = fsspec.filesystem("memory"), out / "subjects" / "rex"
    bucket.put(f"{out}/shards", "/photos/shards", recursive=True)
    at = small_config("data.shards=memory://photos/shards", "data.schemes=[memory]")
    try:
        ours, theirs = (read_photos(folder, "rex", config) for config in (small_config(), at))
    finally:
        bucket.rm("/photos", recursive=True)
    assert [photo.tobytes() for photo in ours] == [photo.tobytes() for photo in theirs] and ours
    assert len(read_photos(folder, "rex", at, out / "shards")) == len(ours)
    with pytest.raises(DataError, match="cannot be read"):
        read_photos(folder, "rex", at)
    with pytest.raises(DataError, match="or allow its scheme"):
        read_photos(folder, "rex", small_config("data.shards=memory://photos/shards"))


def test_an_index_is_loaded_once_for_all_subjects_and_anew_when_it_changed(out, monkeypatch):
    bucket, loads, load = fsspec.filesystem("memory"), [], Index.load
    monkeypatch.setattr(Index, "load", lambda *words: (loads.append(words), load(*words))[1])

    def read(config, *subjects):
        return [len(read_photos(out / "subjects" / name, name, config)) for name in subjects]

    assert read(small_config(), "rex", "ann", "mug", "rex") == [2, 2, 2, 2] and len(loads) == 1
    sound = load(out / "shards")
    (out / "shards" / INDEX_NAME).write_bytes(b"damaged")
    with pytest.raises(DataError, match="is damaged"):
        read(small_config(), "rex")
    sound.save(out / "shards")
    assert read(small_config(), "rex", "mug") == [2, 2] and len(loads) == 3
    bucket.put(f"{out}/shards", "/indexed/shards", recursive=True)
    at = small_config("data.shards=memory://indexed/shards", "data.schemes=[memory]")
    try:
        assert read(at, "rex", "mug") == [2, 2] and len(loads) == 4
    finally:
        bucket.rm("/indexed", recursive=True)
