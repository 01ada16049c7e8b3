"""The bytes of a sample in a tar file: the same for equal samples, and sound by dbtrain's own check and tarfile's."""

import dataclasses
import io
import tarfile

from dbtrain.data import tar
from tests.kit.made_photos import make_samples


def test_what_is_written_is_found_sound():
    sample = next(make_samples())
    assert tar.problem(tar.to_tar(sample), sample.key) is None
    other = dataclasses.replace(sample, meta={"b": 1, "a": 2}), dataclasses.replace(sample, meta={"a": 2, "b": 1})
    assert tar.to_tar(other[0]) == tar.to_tar(other[1])
    with tarfile.open(fileobj=io.BytesIO(tar.to_tar(sample))) as file:
        assert [(m.mtime, m.uid, m.mode) for m in file] == [(0, 0, 0o644)] * 2


def test_a_sample_comes_back_from_its_members():
    sample = next(make_samples())
    members = tar.members(tar.to_tar(sample))
    assert tar.from_tar(sample.key, members["png"], "png", members["json"]) == sample
