"""Shards that grow: what joins is added once, what is there keeps its bytes, and what is another input is refused."""

import pytest

from dbtrain.data.index import INDEX_NAME, Index
from dbtrain.data.shards import GROWING
from dbtrain.data.stream import read_samples, verify
from dbtrain.errors import DataError
from dbtrain.settings.config import RunConfig
from dbtrain.storage.atomic import held
from dbtrain.subjects import sharding
from dbtrain.subjects.manifest import scan_manifest
from dbtrain.subjects.sharding import photo_samples, shard_subjects
from tests.kit.made_photos import picture, png

CONFIG = RunConfig.model_validate({"data": {"resolution": 32}})


class Folder:
    """A manifest with its photos, and the shards made from it."""

    def __init__(self, root):
        self.root, self.out, self.said, self.rows = root, root / "out", [], {}
        self.join("cat", 2)
        self.join("dog", 2)

    def photo(self, subject, name, seed):
        (self.root / subject).mkdir(exist_ok=True)
        (self.root / subject / name).write_bytes(png(picture(seed=seed)))

    def join(self, subject, photos, noun="pet", caption=""):
        for number in range(photos):
            self.photo(subject, f"p{number}.png", 10 * len(self.rows) + number)
        self.rows[subject] = f"{subject},{noun},{subject},{caption}"

    def shard(self, skip_bad=False):
        path = self.root / "m.csv"
        path.write_text("\n".join(["subject,class,images,caption", *self.rows.values()]) + "\n")
        return shard_subjects(*scan_manifest(path), self.out, CONFIG, self.said.append, skip_bad)

    def stored(self, subject):
        """A subject's samples, without what says where they lie."""
        return list(read_samples(self.out, Index.load(self.out).entries_of(subject)))

    def files(self):
        return {path.name: path.read_bytes() for path in self.out.iterdir()}

    def whole(self):
        """Whether the folder is sound, and each subject has what a folder that is made at once has."""
        subjects = scan_manifest(self.root / "m.csv")[0]
        return not verify(self.out) and all(
            self.stored(subject.id) == list(photo_samples([subject], 32)) for subject in subjects
        )


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path)
    made.shard()
    return made


@pytest.fixture
def encoded(monkeypatch):
    """The subjects whose photos are encoded, one entry a photo."""
    seen, make = [], sharding._photo_sample
    monkeypatch.setattr(sharding, "_photo_sample", lambda *args: seen.append(args[0].id) or make(*args))
    return seen


def test_rows_that_join_are_appended_and_nothing_is_sharded_twice(folder, encoded):
    before = folder.files()
    folder.join("ant", 2)
    folder.rows = {"ant": folder.rows.pop("ant"), **folder.rows}
    folder.shard()
    assert encoded == ["ant", "ant"]
    after = folder.files()
    assert after["train-000000.tar"] == before["train-000000.tar"] and set(after) - set(before) == {"train-000001.tar"}
    encoded.clear()
    folder.shard()
    assert not encoded and folder.whole()


def test_photos_that_join_stand_where_they_would_from_the_start(folder, encoded):
    folder.photo("cat", "p05.png", 77)
    folder.photo("cat", "a.png", 78)
    folder.join("ant", 1)
    folder.shard()
    assert sorted(encoded) == ["ant", *["cat"] * 4]
    assert set(folder.files()) == {"train-000001.tar", INDEX_NAME}, "the shard of the former photos is gone"
    assert "photos join cat" in "\n".join(folder.said)
    assert folder.whole()


def test_a_row_that_is_gone_is_told_and_left_alone(folder, encoded):
    gone = folder.rows.pop("dog")
    before = folder.stored("dog")
    folder.shard()
    assert any("dog have no row any more" in line for line in folder.said)
    folder.join("ant", 1)
    folder.shard()
    assert folder.stored("dog") == before and encoded == ["ant"]
    folder.rows["dog"] = gone
    folder.shard()
    assert encoded == ["ant"] and folder.stored("dog") == before


def test_a_photo_under_another_name_is_the_same_photo(folder, encoded):
    before = Index.load(folder.out).entries
    (folder.root / "cat" / "p0.png").rename(folder.root / "cat" / "zz.png")
    assert folder.shard().entries == before and not encoded


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda folder: (folder.root / "cat" / "p0.png").unlink(), "cat: 1 of its stored photos are gone or changed"),
        (lambda folder: folder.photo("cat", "p0.png", 99), "cat: 1 of its stored photos are gone or changed"),
        (lambda folder: folder.join("cat", 0, "tiger"), "cat: class was 'pet', is 'tiger'"),
        (lambda folder: folder.join("cat", 0, caption="{identifier} x"), "caption was '', is '{identifier} x'"),
    ],
    ids=["photo gone", "photo changed", "class", "caption"],
)
def test_other_changes_are_refused_by_name_and_nothing_is_written(folder, change, match):
    before = folder.files()
    folder.join("ant", 1)
    change(folder)
    with pytest.raises(DataError, match=match):
        folder.shard()
    assert folder.files() == before


def test_a_bad_photo_that_joins_changes_nothing(folder):
    before = folder.files()
    folder.join("ant", 1)
    (folder.root / "ant" / "p0.png").write_bytes(b"none")
    with pytest.raises(DataError, match="ant"):
        folder.shard()
    assert folder.files() == before
    folder.shard(skip_bad=True)
    assert "ant" not in Index.load(folder.out).subjects


@pytest.mark.parametrize("when", ["before the index", "after the index"])
def test_a_growth_that_is_killed_is_done_by_the_next_run(folder, monkeypatch, when):
    folder.photo("cat", "p9.png", 77)
    save, before = Index.save, Index.load(folder.out)

    def killed(self, out):
        if when == "after the index":
            save(self, out)
        raise SystemExit

    monkeypatch.setattr(Index, "save", killed)
    with pytest.raises(SystemExit):
        folder.shard()
    monkeypatch.undo()
    assert {"train-000000.tar", "train-000001.tar"} <= set(folder.files())
    assert (Index.load(folder.out) == before) == (when == "before the index")
    folder.shard()
    assert set(folder.files()) - {GROWING} == {"train-000001.tar", INDEX_NAME} and folder.whole()


def test_two_writers_do_not_grow_one_folder(folder):
    folder.join("ant", 1)
    with held(folder.out / GROWING), pytest.raises(DataError, match="another process is writing there"):
        folder.shard()


def test_a_subject_that_spans_two_shards_moves_whole(tmp_path, monkeypatch):
    from dbtrain.data import shards

    monkeypatch.setattr(shards.write_shards, "__defaults__", (12_000, "", False))
    folder = Folder(tmp_path)
    folder.join("eel", 3)
    folder.join("fox", 3)
    index = folder.shard()
    assert len(index.shards) > 2
    folder.photo("cat", "p9.png", 77)
    folder.shard()
    assert folder.whole()
