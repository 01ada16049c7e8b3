"""Tensors are computed once, read afterwards, and computed again where they do not verify."""

import errno
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dbtrain.storage import kept_tensors
from dbtrain.storage.kept_tensors import kept_tensor, tensor_damage

VALUE = torch.arange(6.0).reshape(2, 3)


class Making:
    """Makes VALUE and counts how often."""

    count = 0

    def __call__(self):
        self.count += 1
        return VALUE


def test_a_tensor_is_made_once_for_all_that_decides_it(tmp_path):
    make = Making()
    for _ in range(2):
        assert torch.equal(kept_tensor(tmp_path, {"model": "a", "size": 3}, make), VALUE)
    assert torch.equal(kept_tensor(tmp_path, {"size": 3, "model": "a"}, make), VALUE)
    assert make.count == 1
    kept_tensor(tmp_path, {"model": "b", "size": 3}, make)
    assert make.count == 2 and tensor_damage(tmp_path) == []
    told = {json.loads(path.read_text())["of"]["model"] for path in tmp_path.glob("*.json")}
    assert told == {"a", "b"}


def test_who_asks_at_once_waits_for_the_one_who_makes(tmp_path):
    make = Making()
    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(lambda _: kept_tensor(tmp_path, {}, lambda: (time.sleep(0.2), make())[1]), range(4)))
    assert make.count == 1 and all(torch.equal(value, VALUE) for value in values)


@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_a_damaged_tensor_is_named_and_made_again(tmp_path, ending):
    make = Making()
    kept_tensor(tmp_path, {}, make)
    (path,) = tmp_path.glob(f"*.{ending}")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (line,) = tensor_damage(tmp_path)
    assert line.endswith("differs from its digest; delete it")
    assert torch.equal(kept_tensor(tmp_path, {}, make), VALUE)
    assert make.count == 2 and tensor_damage(tmp_path) == []


def test_an_unfinished_tensor_is_no_damage_and_is_made(tmp_path):
    kept_tensor(tmp_path, {}, Making())
    (path,) = tmp_path.glob("*.json")
    path.unlink()
    make = Making()
    assert tensor_damage(tmp_path) == []
    assert torch.equal(kept_tensor(tmp_path, {}, make), VALUE) and make.count == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_where_nothing_can_be_written_the_tensor_is_made_and_not_kept(tmp_path, monkeypatch, number):
    def refuse(path, content):
        raise OSError(number, "refused")

    monkeypatch.setattr(kept_tensors, "write_file", refuse)
    assert torch.equal(kept_tensor(tmp_path, {}, Making()), VALUE)
    assert list(tmp_path.glob("*.json")) == []


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def refuse(path, content):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(kept_tensors, "write_file", refuse)
    with pytest.raises(OSError, match="full"):
        kept_tensor(tmp_path, {}, Making())
