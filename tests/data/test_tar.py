"""The bytes of a sample in a tar file: the same for equal samples, and sound by dbtrain's own check and tarfile's."""

import dataclasses
import io
import tarfile

import pytest

from dbtrain.data import tar
from tests.kit.made_photos import make_samples, mask_of, png


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


def test_a_mask_is_a_third_member_under_the_same_check():
    plain = next(make_samples())
    sample = dataclasses.replace(plain, mask=png(mask_of()))
    content = tar.to_tar(sample)
    assert content.startswith(tar.to_tar(plain)[: 512 + len(plain.image)]), "the image stays where it was"
    assert tar.problem(content, sample.key) is None
    members = tar.members(content)
    assert list(members) == ["png", "json", "mask.png"] and members["mask.png"] == sample.mask
    assert tar.from_tar(sample.key, members["png"], "png", members["json"], members["mask.png"]) == sample
    for mask in (None, sample.mask + b"x"):
        with pytest.raises(ValueError, match="mask's size"):
            tar.from_tar(sample.key, members["png"], "png", members["json"], mask)
    with pytest.raises(ValueError, match="mask's size"):
        tar.from_tar(plain.key, plain.image, "png", tar.members(tar.to_tar(plain))["json"], sample.mask)
    third = content[len(content) - 512 - -(-len(sample.mask) // 512) * 512 :]
    for bad in (content + third, third + content, tar.to_tar(plain) + tar.to_tar(plain)):
        assert "holds [" in tar.problem(bad, sample.key)
