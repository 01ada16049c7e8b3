"""record.json against the files beside it: what is found, by whom, and what is said."""

import hashlib
import json
import os

import pytest

from dbtrain.errors import DataError
from dbtrain.fleet.messages import Published
from dbtrain.fleet.worker import Worker
from dbtrain.results.record import RECORD, file_problem, finished_record, read_record, refuse_changed, write_record
from tests.kit.published import PUBLISHED

ABOUT = dict.fromkeys(("subject", "class", "identifier", "run", "base", "base_digest"), "x")
DAMAGES = {
    "a flipped bit": (lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:]), r"has the sha256 .*, .* says"),
    "a cut": (lambda path: os.truncate(path, 3), "has 3 bytes, record.json says 8"),
    "a deletion": (lambda path: path.unlink(), "is missing, and record.json names it"),
    "a folder in its place": (lambda path: (path.unlink(), path.mkdir()), "is missing"),
}


@pytest.fixture
def folder(tmp_path):
    """A finished subject in name."""
    place = tmp_path / "subjects" / "rex"
    (place / "model").mkdir(parents=True)
    files = [place / "adapter", place / "model" / "weights"]
    for path in files:
        path.write_bytes(bytes(8))
    write_record(place, {**ABOUT, "stages_s": {"train": 1.0}}, files)
    return place


@pytest.mark.parametrize("name", ["adapter", "model/weights"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_the_record_says_is_named(folder, damage, name):
    assert finished_record(folder) == read_record(folder)
    harm, said = DAMAGES[damage]
    harm(folder / name)
    with pytest.raises(DataError, match=f"{name}: {said}.*; run the same training again, which mends it"):
        finished_record(folder)


def test_a_file_is_judged_by_itself_where_it_alone_is_used(folder):
    DAMAGES["a flipped bit"][0](folder / "model" / "weights")
    (folder / "mine").write_bytes(b"no file of ours")
    refuse_changed(folder / "adapter"), refuse_changed(folder / "mine")
    DAMAGES["a flipped bit"][0](folder / "adapter")
    with pytest.raises(DataError, match="adapter: has the sha256"):
        refuse_changed(folder / "adapter")


def test_large_files_are_judged_by_size_and_the_remedy_knows(folder, monkeypatch):
    DAMAGES["a flipped bit"][0](folder / "adapter")
    record = read_record(folder)
    assert file_problem(folder, record, 16) and not file_problem(folder, record, 15)
    monkeypatch.setattr("dbtrain.results.record.QUICK_BYTES", 15)
    with pytest.raises(DataError, match="; remove record.json there and run the same training again"):
        finished_record(folder)
    DAMAGES["a cut"][0](folder / "adapter")
    assert "has 3 bytes" in file_problem(folder, record, 0)


def test_a_record_of_old_has_no_sizes_and_is_read_as_before(folder):
    record = read_record(folder)
    for old in ({"sizes": None}, {"sizes": {}}, {"sizes": {"adapter": 8}}):
        assert file_problem(folder, {**record, **old}) is None
    DAMAGES["a cut"][0](folder / "adapter")
    assert "has the sha256" in file_problem(folder, {**record, "sizes": None})


def test_no_name_in_a_record_leads_out_of_the_folder(folder):
    (folder.parent / "other").write_bytes(bytes(8))
    record = read_record(folder)
    digest = record["files"]["adapter"]
    for name in ("../other", str(folder / "adapter")):
        assert "is missing" in file_problem(folder, {**record, "files": {name: digest}})


def test_a_fleet_lets_go_of_a_record_that_does_not_verify(folder):
    """Else the next attempt would take the subject for finished, and no retry could mend it."""
    worker = Worker("worker", str(folder.parents[1]), 20)
    published = Published(1, 0, "rex", 2.0)
    assert worker._checked(published).result["gpu_seconds"] == 2.0
    DAMAGES["a flipped bit"][0](folder / "adapter")
    end = worker._checked(published).end
    assert end.cause == "error" and "adapter: has the sha256" in end.reason
    assert not (folder / RECORD).exists()
    assert "holds no finished subject" in worker._checked(published).end.reason


def test_record_has_the_digests_of_the_artefacts(tmp_path):
    files = {"a.bin": b"first", "model/b.bin": b"second"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert read_record(tmp_path) is None
    write_record(tmp_path, PUBLISHED, [tmp_path / name for name in files])
    record = read_record(tmp_path)
    assert record.pop("files") == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert record.pop("sizes") == {name: len(data) for name, data in files.items()}
    assert record == PUBLISHED and json.loads((tmp_path / "record.json").read_text())["subject"] == "rex"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"files": []}', "[" * 9000])
def test_a_damaged_record_says_what_to_do(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(DataError, match=r"record.json: is damaged; remove it and run the same training again"):
        read_record(tmp_path)
