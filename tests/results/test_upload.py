"""A finished subject's copy elsewhere: whole or without a record, whatever happens on the way."""

import hashlib
import json
import os
import shutil
from functools import partial

import fsspec
import pytest

from dbtrain.errors import ConfigError, DataError
from dbtrain.results.record import finished_record
from dbtrain.results.upload import NOTE, copy_at, delete_copy, upload, uploads_of
from tests.faults.kit import Fault, forked, trace
from tests.kit.object_store import BUCKET, kill_at, object_store
from tests.kit.published import make_result


@pytest.fixture
def result(tmp_path):
    return make_result(tmp_path / "out" / "rex")


@pytest.fixture(scope="module")
def server():
    with object_store() as made:
        yield made


@pytest.fixture
def store(server):
    server.clear()
    return server


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def contents(folder):
    """Content by name of what a result is."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != NOTE]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def in_store(store, prefix="all/rex/"):
    return {key.removeprefix(prefix): value for key, value in store.objects().items() if key.startswith(prefix)}


def whole_or_none(copy):
    """Nothing to complain about: a copy without a record, or with all files of its record."""
    if "record.json" not in copy:
        return None
    record = json.loads(copy["record.json"])
    for name, digest in record["files"].items():
        if hashlib.sha256(copy.get(name, b"")).hexdigest() != digest:
            return f"a record without its {name}"
    return None


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_a_folder_gets_the_result_and_loads_as_one(result, tmp_path, address):
    url = address.format(tmp_path / "far")
    assert upload(result, url) and not upload(result, url)
    assert contents(tmp_path / "far" / "rex") == contents(result)
    assert finished_record(tmp_path / "far" / "rex") == finished_record(result)
    assert list(uploads_of(result)) == [f"{url}/rex"]


def test_an_object_store_gets_it(result, memory):
    assert upload(result, "memory://all") and not upload(result, "memory://all")
    assert {name.removeprefix("/all/rex/"): memory.cat(name) for name in memory.find("/all")} == contents(result)


def test_a_real_s3_server_gets_it_and_each_file_once(result, store):
    assert upload(result, f"s3://{BUCKET}/all") and in_store(store) == contents(result)
    puts = [line for line in store.requests if line.startswith("PUT")]
    assert len(puts) == len(set(puts)) == len(contents(result)) and puts[-1].endswith("record.json")
    store.requests.clear()
    assert not upload(result, f"s3://{BUCKET}/all")
    assert {line.split()[0] for line in store.requests} <= {"GET", "HEAD"}


def test_what_a_store_keeps_differently_is_noticed_and_leaves_no_record(result, store):
    def rot(number, environ):
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith("weights.bin"):
            store.keep("all/rex/weights.bin", b"rot")

    store.after = rot
    with pytest.raises(DataError, match="weights.bin: has the sha256"):
        upload(result, f"s3://{BUCKET}/all")
    assert "record.json" not in in_store(store)


def test_files_that_are_there_are_not_sent_again(result, store):
    upload(result, f"s3://{BUCKET}/all")
    files = fsspec.filesystem("s3")
    files.rm_file(f"{BUCKET}/all/rex/record.json")
    files.pipe_file(f"{BUCKET}/all/rex/weights.bin", b"rot")
    store.requests.clear()
    assert upload(result, f"s3://{BUCKET}/all") and in_store(store) == contents(result)
    sent = [line.rpartition("/")[2] for line in store.requests if line.startswith("PUT")]
    assert sent == ["weights.bin", "record.json"]


@pytest.mark.parametrize(
    "address",
    [
        "http://host/x",
        "s3::memory://x",
        "s3://key:secret@bucket/x",
        "s3://b/../c",
        "github://a:b@c/x",
        "simplecache::s3://x",
    ],
)
def test_other_addresses_are_refused(result, address):
    with pytest.raises(ConfigError, match="cannot be used; give a folder or SCHEME"):
        upload(result, address)


def test_a_missing_library_is_named(result):
    with pytest.raises(ConfigError, match=r"pip install 'dbtrain\[stores\]'"):
        copy_at("gs://bucket/x") if not _has("gcsfs") else copy_at("abfs://bucket/x")


def _has(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_the_runs_own_folder_is_no_other_place(result):
    with pytest.raises(ConfigError, match="the run's own results"):
        upload(result, str(result.parent))


def test_rot_is_not_sent(result, memory):
    (result / "weights.bin").write_bytes(b"rot")
    with pytest.raises(DataError, match=r"weights.bin: has 3 bytes"):
        upload(result, "memory://all")
    assert memory.find("/all") == [] and uploads_of(result) == {}


def test_another_trainings_result_is_left_alone(result, tmp_path, memory):
    upload(make_result(tmp_path / "other" / "rex", run="3"), "memory://all")
    before = memory.cat("/all/rex/record.json")
    with pytest.raises(ConfigError, match="holds another result"):
        upload(result, "memory://all")
    assert memory.cat("/all/rex/record.json") == before and uploads_of(result) == {}


def test_a_longer_training_replaces_its_own_and_takes_old_files_away(result, memory):
    upload(result, "memory://all")
    shutil.rmtree(result / "model")
    make_result(result, run="3", files=("weights.bin", "other.bin"))
    assert upload(result, "memory://all")
    assert {name.removeprefix("/all/rex/"): memory.cat(name) for name in memory.find("/all")} == contents(result)
    assert len(uploads_of(result)["memory://all/rex"]) == 2


def test_copies_are_deleted_where_they_are_and_nowhere_else(result, tmp_path, memory):
    addresses = ["memory://all/rex", f"{tmp_path}/far/rex", "memory://more/of/rex"]
    for address in addresses:
        upload(result, address.removesuffix("/rex"))
    assert list(uploads_of(result)) == addresses
    upload(make_result(tmp_path / "out" / "tom"), "memory://all")
    for address in (*addresses, *addresses):
        delete_copy(address)
    assert not (tmp_path / "far" / "rex").exists()
    assert {name.split("/")[2] for name in memory.find("/")} == {"tom"}


def test_a_copy_that_was_only_begun_is_deleted_too(result, store):
    store.behave = lambda number, environ: 503 if environ["PATH_INFO"].endswith("a.bin") else None
    with pytest.raises(OSError):
        upload(result, f"s3://{BUCKET}/all")
    assert in_store(store) and "record.json" not in in_store(store)
    delete_copy(f"s3://{BUCKET}/all/rex")
    assert store.objects() == {}


def test_a_copy_that_cannot_be_deleted_is_named(result, store):
    upload(result, f"s3://{BUCKET}/all")
    store.behave = lambda number, environ: 503
    with pytest.raises(DataError, match=f"s3://{BUCKET}/all/rex: the copy was not deleted"):
        delete_copy(f"s3://{BUCKET}/all/rex")


def struck(result, far):
    """What is at fault after the upload was killed at each of its file operations in turn, and done again."""
    work, root = partial(upload, result, str(far)), result.parents[1]
    wrong, before = [], contents(far / "rex") if far.exists() else {}
    kept = root.with_name("kept")
    shutil.copytree(root, kept)
    operations = trace(work, root)
    for at in range(1, len(operations) + 1):
        shutil.rmtree(root)
        shutil.copytree(kept, root)
        ending = forked(work, Fault("kill", at), root)
        copy = contents(far / "rex") if far.exists() else {}
        if ending.code != -9 or whole_or_none(copy):
            wrong.append((at, operations[at - 1], ending.code, whole_or_none(copy)))
        upload(result, str(far))
        if contents(far / "rex") != contents(result):
            wrong.append((at, operations[at - 1], "again", sorted(contents(far / "rex"))))
    assert before != contents(result)
    return len(operations), wrong


@pytest.mark.parametrize("old", [False, True])
def test_killed_at_any_file_operation_a_copy_is_whole_or_none(tmp_path, old):
    result, far = tmp_path / "root" / "out" / "rex", tmp_path / "root" / "far"
    make_result(result, files=("a/b.bin",))
    if old:
        upload(result, str(far))
        make_result(result, run="3", files=("a/b.bin",))
    operations, wrong = struck(result, far)
    assert wrong == [] and operations > 40


@pytest.mark.parametrize("answered", [False, True])
def test_killed_at_any_request_a_copy_is_whole_or_none(result, store, tmp_path, answered):
    """Every seventh request, by turns before and after its answer; `DBTRAIN_STRIDE=1` takes them all, which needs a
    minute."""
    stride = int(os.environ.get("DBTRAIN_STRIDE", "14"))
    pid, url = tmp_path / "pid", f"s3://{BUCKET}/all"

    def work():
        pid.write_text(str(os.getpid()))
        upload(result, url)

    assert forked(work, None, tmp_path).code == 0
    requests, wrong = len(store.requests), []
    for at in range(requests - (0 if answered else stride // 2), 0, -stride):
        store.clear()
        shutil.rmtree(result)
        make_result(result)
        kill_at(store, at, answered, pid)
        ending = forked(work, None, tmp_path)
        if ending.code != -9 or whole_or_none(in_store(store)):
            wrong.append((at, ending.code, ending.stderr[-300:]))
        store.behave = store.after = lambda number, environ: None
        if forked(work, None, tmp_path).code != 0 or in_store(store) != contents(result):
            wrong.append((at, "again", sorted(in_store(store))))
    assert wrong == [] and requests > 20
