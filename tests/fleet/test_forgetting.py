"""Forgetting a person: nothing of it is left, nothing else changes, and a kill at any moment only delays it."""

import json
import shutil

import pytest

from dbtrain.data.index import Index
from dbtrain.data.stream import verify
from dbtrain.errors import DataError
from dbtrain.fleet import forgetting
from dbtrain.fleet.forgetting import COPIES, end_forgetting, forget, told
from dbtrain.fleet.ledger import Ledger
from dbtrain.fleet.status import read_rows
from dbtrain.report.building import rebuild
from dbtrain.results import upload
from dbtrain.storage.atomic import LOCK, held
from dbtrain.subjects.forgotten import PENDING, TOMBSTONES, change_pending, read_tombstones
from tests.kit.forgettable import PEOPLE, PERSON, fresh, make_forgettable, needles, neighbours, traces


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a run, what must not be found in it, what must stay)."""
    folder = tmp_path_factory.mktemp("forgettable")
    run = make_forgettable(folder)
    wanted = needles(run, folder / "input")
    assert len({line.split(": ")[0] for line in traces(run, wanted)}) > 20
    return run, wanted, neighbours(run)


@pytest.fixture
def run(made, tmp_path):
    return fresh(made[0], tmp_path / "run")


def test_nothing_of_a_person_is_left_and_the_others_keep_every_bit(run, made):
    done = forget(run, [PERSON])
    assert traces(run, made[1]) == [] and neighbours(run) == made[2] and verify(run / "shards") == []
    lines = "\n".join(told(run, done))
    for what in ("samples in shards: 2", "rows of the ledger: 1", "lines of identifiers.jsonl: 1", "skipped.json: 1",
                 "lines of logs/worker-001.log: 2", "lines of fleet.jsonl: 1", "subjects in evaluation.json: 1",
                 "pages in report: 1", "a copy may still be in: m.csv"):  # fmt: skip
        assert what in lines, lines
    rows = {row["subject"]: row["state"] for row in read_rows(run)}
    stone = read_tombstones(run).name(PERSON)
    assert rows == {stone: "forgotten", "rex-one": "finished", "tom-two": "finished", "bad": "skipped"}
    rebuild(run, processes=1)
    assert traces(run, made[1]) == []
    assert forget(run, [PERSON]).removed == [], "a second time there is nothing to do"


def test_all_of_a_run_may_be_forgotten_and_others_join_afterwards(run, made):
    forget(run, PEOPLE)
    index = Index.load(run / "shards")
    assert (index.entries, index.shards, verify(run / "shards")) == ((), (), [])
    assert not (run / "evaluation.json").exists() and list((run / "subjects").iterdir()) == []


def test_what_is_not_there_is_refused_before_anything_changes(run, tmp_path):
    with pytest.raises(DataError, match="its run has no subject 'nobody'"):
        forget(run, [PERSON, "nobody"])
    with pytest.raises(DataError, match="holds no run"):
        forget(tmp_path, [PERSON])
    assert (run / "subjects" / PERSON).exists() and not (run / PENDING).exists() and not (run / TOMBSTONES).exists()


def test_a_training_at_work_is_not_disturbed_and_a_driver_is_asked(run):
    from dbtrain.fleet.lease import Lease

    with held(run / LOCK):
        with pytest.raises(DataError, match="a training is at work there"):
            forget(run, [PERSON])
        assert not (run / PENDING).exists()
        lease = Lease(run)
        try:
            assert forget(run, [PERSON]) is None and (run / PENDING).exists()
        finally:
            lease.release()
    assert (run / "subjects" / PERSON).exists()
    forget(run, [])
    assert not (run / "subjects" / PERSON).exists() and not (run / PENDING).exists()


def test_a_run_of_train_is_forgotten_without_a_ledger(run, made):
    (run / "ledger.sqlite").unlink()
    forget(run, [PERSON])
    assert traces(run, made[1]) == [] and neighbours(run) == made[2] and (run / TOMBSTONES).exists()


@pytest.fixture
def copies(run, tmp_path, monkeypatch):
    """(addresses of a person's two uploaded copies, the errors that the second one's store still has to give)."""
    place, errors = run / "subjects" / PERSON, [PermissionError(13, "no right to delete")] * 4
    copies = [tmp_path / "store" / PERSON, tmp_path / "far" / PERSON]
    for copy in copies:
        shutil.copytree(place, copy)
    (tmp_path / "store" / "rex-one").mkdir()
    (place / "published.json").write_text(json.dumps({str(copy): ["0" * 64] for copy in copies}))
    real = upload.copy_at

    def refusing(address):
        if "far" in address and errors:
            raise errors.pop()
        return real(address)

    monkeypatch.setattr(upload, "copy_at", refusing)
    monkeypatch.setattr(forgetting, "PAUSES_S", (0.0, 0.0))
    return copies, errors


def test_uploaded_copies_are_deleted_and_one_that_a_store_keeps_is_tried_by_the_next_command(run, tmp_path, copies):
    (near, far), _ = copies
    done = forget(run, [PERSON])
    assert not near.exists() and (tmp_path / "store" / "rex-one").is_dir() and far.exists()
    assert list(done.refused) == [str(far)] and "uploaded copies: 1" in done.removed
    assert f"{far}: the copy was not deleted ([Errno 13] no right to delete)" in "\n".join(told(run, done))
    assert not (run / "subjects" / PERSON).exists() and not (run / PENDING).exists()
    again = forget(run, [])
    assert (again.refused, again.removed) == ({}, ["uploaded copies: 1"])
    assert not far.exists() and not (run / COPIES).exists() and PERSON not in str(list(run.rglob("*")))


def test_a_store_that_refuses_for_a_moment_is_tried_again_at_once(run, copies, made):
    (near, far), errors = copies
    del errors[2:]
    done = forget(run, [PERSON])
    assert (done.refused, near.exists(), far.exists()) == ({}, False, False)
    assert traces(run, made[1]) == []


def test_where_copies_are_is_known_until_they_are_deleted_whenever_a_kill_comes(run, copies, monkeypatch):
    (near, far), errors = copies
    errors.clear()

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(forgetting.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        forget(run, [PERSON])
    assert near.exists() and far.exists() and json.loads((run / COPIES).read_text()) == sorted([str(near), str(far)])
    monkeypatch.undo()
    forget(run, [])
    assert not near.exists() and not far.exists() and not (run / COPIES).exists()


def test_a_link_in_place_of_a_subject_is_unlinked_and_its_target_is_told(run, tmp_path):
    shutil.move(run / "subjects" / PERSON, tmp_path / "far")
    (run / "subjects" / PERSON).symlink_to(tmp_path / "far")
    done = forget(run, [PERSON])
    assert any(str(tmp_path / "far") in line for line in done.elsewhere) and (tmp_path / "far").is_dir()
    assert not (run / "subjects" / PERSON).is_symlink()


def test_the_ledgers_file_keeps_no_byte_where_sqlite_does_not_erase(run, made):
    ledger = Ledger(run)
    ledger.db.execute("PRAGMA secure_delete=OFF")  # builds of SQLite differ in its default
    change_pending(run, {PERSON: [PERSON]})
    assert PERSON.encode() in (run / "ledger.sqlite").read_bytes()
    end_forgetting(run, ledger)
    assert [line for line in traces(run, made[1]) if "ledger" in line] == []
    ledger.close()


def test_the_ledger_names_a_tombstone_once(run):
    forget(run, [PERSON])
    ledger = Ledger(run)
    row = ledger.row(0)
    assert (row["state"], row["spec"], row["class"], row["files"], row["gpu_seconds"]) == (
        "forgotten", "{}", None, None, 3.0)  # fmt: skip
    assert ledger.widest()[0] == 2 and ledger.counts()["forgotten"] == 1
    ledger.close()
