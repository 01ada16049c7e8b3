"""Tars made elsewhere become a subject's samples; hostile ones are refused in a line."""

import io
import json
import tarfile

import numpy as np
import pytest

from dbtrain.data.images import open_photo
from dbtrain.data.shards import write_shards
from dbtrain.data.stream import read_samples, verify
from dbtrain.errors import DataError
from dbtrain.settings.config import DataConfig
from dbtrain.subjects.tars import index_tars, tar_samples
from dbtrain.values import OWN
from tests.kit.made_photos import jpeg, picture, png

DATA = DataConfig(resolution=32)
PNG = png(picture())


def tar(path, members, **fields):
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in fields.items():
                setattr(info, key, value)
            file.addfile(info, io.BytesIO(content))
    return path


def samples(path, said=None):
    return list(tar_samples([path], "rex", "dog", DATA, (said if said is not None else []).append))


def test_photos_and_captions_are_taken_by_their_keys(tmp_path):
    members = [
        ("set/0001.jpg", jpeg(picture())), ("set/0001.txt", b"a {subject}\non grass"), ("set/0001.cls", b"7"),
        ("set/0002.json", json.dumps({"caption": "asleep", "width": 9}).encode()), ("set/0002.image", PNG),
        ("README", b"hello"), ("set/0003.PNG", PNG),
    ]  # fmt: skip
    said = []
    found = samples(tar(tmp_path / "a.tar", members), said)
    assert [one.key for one in found] == ["rex-0-0", "rex-0-1", "rex-0-2"]
    assert [(one.caption, one.meta.get(OWN)) for one in found] == [
        ("a {subject} on grass", True), ("{subject}, asleep", True), ("", None)]  # fmt: skip
    assert said == [f"note: {tmp_path / 'a.tar'}: not used: '0001.cls', 'README'"]
    index = write_shards(found, tmp_path / "shards")
    assert not verify(tmp_path / "shards")
    stored = list(read_samples(tmp_path / "shards", index.entries))
    assert stored == found and stored[2].subject == "rex" and stored[2].meta["class"] == "dog"
    assert np.asarray(open_photo(stored[2].image)).shape == (32, 38, 3)


HOSTILE = {
    "no tar": (b"PK\3\4", "cannot be read as a tar"),
    "empty": (b"", "cannot be read as a tar"),
    "nothing in it": ([], "holds no photo"),
    "no photo": ([("1.txt", b"x")], "holds no photo"),
    "damaged photo": ([("1.jpg", PNG[:200])], "is damaged or cut short"),
    "no photo by content": ([("1.png", b"#!/bin/sh")], "is no JPEG, PNG or WebP"),
    "two pictures": ([("1.jpg", PNG), ("1.png", PNG)], "has 2 pictures"),
    "a caption that is a pickle": ([("1.png", PNG), ("1.txt", b"\x80\4K\1.")], "no caption can be read"),
    "json nested deep": ([("1.png", PNG), ("1.json", b"[" * 60_000)], "no caption can be read"),
    "a long text": ([("1.png", PNG), ("1.txt", b"a" * 70_000)], "no caption can be read"),
    "a placeholder": ([("1.png", PNG), ("1.txt", b"{x!r}")], "placeholder"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tar_that_is_none_is_refused_in_a_line(tmp_path, name):
    made, part = HOSTILE[name]
    path = tmp_path / "a.tar"
    path.write_bytes(made) if isinstance(made, bytes) else tar(path, made)
    with pytest.raises(DataError, match=part) as caught:
        samples(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    path = tar(tmp_path / "a.tar", [("1.png", b"")], type=kind, linkname="/etc/passwd")
    with pytest.raises(DataError, match="is no plain file"):
        samples(path)


def test_a_name_that_leads_out_stays_a_name(tmp_path):
    (found,) = samples(tar(tmp_path / "a.tar", [("../../evil.png", PNG)]))
    assert found.meta["source"] == "evil.png" and sorted(tmp_path.iterdir()) == [tmp_path / "a.tar"]


def test_the_same_tars_again_change_nothing_and_others_are_refused(tmp_path):
    path, said = tar(tmp_path / "a.tar", [("1.png", PNG), ("1.txt", b"a dog")]), []
    index = index_tars([path], "rex", "dog", DataConfig(resolution=32), tmp_path / "shards", said.append)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "shards").iterdir()}
    assert index_tars([path], "rex", "dog", DataConfig(resolution=32), tmp_path / "shards", said.append) == index
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "shards").iterdir()} == before
    assert said == [f"{tmp_path / 'shards'}: is up to date; nothing to do"]
    for noun, resolution in (("cat", 32), ("dog", 40)):
        with pytest.raises(DataError, match="is not empty"):
            index_tars([path], "rex", noun, DataConfig(resolution=resolution), tmp_path / "shards", str)
    with pytest.raises(DataError, match="b.tar: cannot be read"):
        index_tars([tmp_path / "b.tar"], "rex", "dog", DataConfig(), tmp_path / "other", str)
