"""Where shards are read from: folders, and addresses whose scheme was allowed; nothing else, however it is spelt."""

import shutil
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.data.index import Index
from dbtrain.data.location import REMOTE, place_of
from dbtrain.data.stream import read_samples, verify
from dbtrain.errors import DataError
from tests.kit.made_photos import make_samples


class Bucket(MemoryFileSystem):
    """An object store in memory under the scheme of a real one."""

    protocol = "s3"
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("s3://", "memory://"))


def fill(files, folder):
    for path in folder.iterdir():
        files.pipe(f"/shards/{path.name}", path.read_bytes())


@pytest.fixture
def bucket(shard_folder, monkeypatch):
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    files = Bucket()
    fill(files, shard_folder)
    yield files
    files.store.clear()


@pytest.mark.parametrize("scheme", ["s3", "memory", "file"])
def test_the_same_samples_come_from_every_place(shard_folder, bucket, scheme):
    memory = fsspec.filesystem("memory")
    fill(memory, shard_folder)
    address = f"file://{shard_folder}" if scheme == "file" else f"{scheme}://shards"
    entries = Index.load(address, [scheme]).entries
    assert entries == Index.load(shard_folder).entries
    assert list(read_samples(address, entries, [scheme])) == list(make_samples())
    assert [one.key for one in read_samples(address, entries[4:8], [scheme])] == [entry.key for entry in entries[4:8]]
    assert verify(address, [scheme]) == []
    memory.rm("/shards", recursive=True)


def test_damage_and_strays_at_an_address_are_named(bucket):
    shard = Index.load("s3://shards", ["s3"]).shards[0].name
    content = bytearray(bucket.cat(f"/shards/{shard}"))
    content[900] ^= 2
    bucket.pipe(f"/shards/{shard}", bytes(content))
    bucket.pipe("/shards/evil.tar", b"x")
    lines = "\n".join(verify("s3://shards", ["s3"]))
    assert f"shard {shard}, sample " in lines and "evil.tar: is not in the index" in lines
    bucket.rm(f"/shards/{shard}")
    assert "cannot be opened" in "\n".join(verify("s3://shards", ["s3"]))


def test_only_the_ranges_asked_for_are_fetched(bucket):
    entries = Index.load("s3://shards", ["s3"]).entries
    for name in {entry.shard for entry in entries} - {entries[0].shard}:
        bucket.rm(f"/shards/{name}")
    assert [one.key for one in read_samples("s3://shards", entries[:1], ["s3"])] == [entries[0].key]


HOSTILE = [
    "pipe:cat /etc/passwd",
    "http://example.org/x",
    "https://example.org/x",
    "ftp://example.org/x",
    "ssh://host/x",
    "data:text/plain,x",
    "simplecache::s3://shards",
    "zip://x::file:///tmp/a.zip",
    "file:///tmp/../etc",
    "s3://user:secret@shards",
    "s3://shards::file:///etc",
    "s3://shards?x=1",
    "S3://shards",
    "FILE:///etc/../etc",
    "memory://a\nb",
    "github://org:repo@main/",
    "reference://",
    "python:os",
    "gs:shards",
]


@pytest.mark.parametrize("address", HOSTILE)
@pytest.mark.parametrize("allowed", [(), REMOTE, ("http", "https", "pipe", "ftp", "ssh", "simplecache", "zip")])
def test_other_addresses_are_refused_before_anything_is_opened(address, allowed, monkeypatch):
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_: pytest.fail("was opened"))
    if address == "S3://shards" and "s3" in allowed:
        pytest.skip("an allowed scheme in capitals")
    with pytest.raises(DataError, match="address"):
        place_of(address, allowed)
    assert verify(address, allowed) != []


def test_a_path_is_a_folder_whatever_its_name(shard_folder, tmp_path, monkeypatch):
    """As in `--out run:1`."""
    monkeypatch.chdir(tmp_path)
    for name in ("run:1", "s3:shards"):
        shutil.copytree(shard_folder, name)
        entries = Index.load(Path(name)).entries
        assert list(read_samples(Path(name), entries)) == list(make_samples())
        assert verify(Path(name)) == []
        with pytest.raises(DataError, match="address"):
            Index.load(name)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", ".hidden", "x..y", "a\0b"])
def test_only_plain_names_are_opened(shard_folder, bucket, name):
    for place in (place_of(shard_folder), place_of("s3://shards", ["s3"])):
        with pytest.raises(DataError, match="no plain file name"):
            place.open(name)


def test_the_verb_asks_for_the_scheme(shard_folder):
    def run(*words):
        return CliRunner().invoke(cli.app, ["shard", "verify", *map(str, words)])

    assert run(shard_folder).stdout == f"{shard_folder}: sound\n"
    assert run(shard_folder, "--json").stdout == "[]\n"
    assert run(f"file://{shard_folder}", "--scheme", "file").exit_code == 0
    refused = run(f"file://{shard_folder}")
    assert refused.exit_code == 3 and "or allow its scheme" in refused.stderr
