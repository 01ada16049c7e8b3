import dataclasses
import hashlib

import pytest

from dbtrain.data.index import INDEX_NAME, Index
from dbtrain.data.shards import MARK, write_shards
from dbtrain.data.stream import verify
from dbtrain.errors import DataError
from dbtrain.settings.config import DataConfig, RunConfig
from dbtrain.values import Role
from tests.faults.campaigns import disturb
from tests.kit.made_photos import make_samples

CONFIG = RunConfig(data=DataConfig(resolution=32))


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


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


def test_folders_with_other_content_are_refused_and_untouched(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"mine")
    for remake, extra in ((False, ()), (True, ("notes.txt",))):
        for name in extra:
            (tmp_path / name).write_bytes(b"mine too")
        before = digests(tmp_path)
        with pytest.raises(DataError, match="is not empty"):
            write_shards(make_samples(), tmp_path, remake=remake)
        assert digests(tmp_path) == before


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
