"""The ledger by itself: compare-and-set, take-over, what is kept, and ledgers of earlier versions."""

import json
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from dbtrain.errors import DataError, FleetError
from dbtrain.fleet.ledger import VERSION, Ledger, decode_subject, encode_subject
from dbtrain.values import Subject
from tests.kit.fleet_run import RESULT, WAITS


def state(ledger, position):
    return ledger.row(position)["state"]


def test_a_subject_finishes_once_and_late_words_change_nothing(ledger):
    with ledger.commit():
        first = ledger.start(1, [0], "w1")[0]
        assert ledger.fail(0, first, WAITS)
        second = ledger.start(2, [0], "w2")[0]
        assert (first, second) == (1, 2)
        assert not ledger.finish(0, first, RESULT)
        assert not ledger.fail(0, first, WAITS)
        assert state(ledger, 0) == "running"
        assert ledger.finish(0, second, RESULT)
        assert not ledger.finish(0, second, RESULT)
    assert state(ledger, 0) == "finished"
    ends = ledger.db.execute("SELECT attempt, outcome, cause FROM attempts ORDER BY 1").fetchall()
    assert [tuple(row) for row in ends] == [(1, "waiting", "crash"), (2, "finished", None)]


def test_only_waiting_subjects_are_given_out_and_a_refused_unit_changes_nothing(ledger):
    with ledger.commit():
        ledger.start(1, [0], "w1")
    with pytest.raises(FleetError, match="number 0 was given out while it was not waiting"), ledger.commit():
        ledger.start(2, [1, 0], "w2")
    assert (state(ledger, 0), state(ledger, 1)) == ("running", "waiting")


def test_a_dead_drivers_subjects_wait_again_without_blame(ledger):
    with ledger.commit():
        ledger.start(1, [0, 1], "w1")
        assert ledger.take_over() == 2
    row = ledger.row(0)
    assert (row["state"], row["attempts"], row["failures"], row["losses"]) == ("waiting", 1, 0, 0)
    assert ledger.retries() == {"driver": 2}


def test_commits_survive_a_kill_at_once(tmp_path):
    """A child commits one row after another and is killed; every row that it reported is there."""
    Ledger(tmp_path, create=True).close()
    code = (
        "import sys; from pathlib import Path; from dbtrain.fleet.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "for n in range(10**6):\n"
        "    with ledger.commit(): ledger.note_spent('prior', str(n), 'w', 1.0, 'done', '')\n"
        "    print(n, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    told = [int(child.stdout.readline()) for _ in range(20)]
    child.kill()
    told += [int(line) for line in child.stdout.read().splitlines()]
    child.wait()
    kept = {int(row[0]) for row in Ledger(tmp_path).db.execute("SELECT class FROM spent")}
    assert set(told) <= kept and len(kept) - len(told) <= 1


def test_a_disk_that_takes_no_more_is_told_and_nothing_is_half_done(ledger):
    ledger.db.execute("PRAGMA max_page_count=1")

    def overfill():
        with ledger.commit():
            for size in (1, 10**6):
                ledger.note_spent("prior", "x" * size, "w", 1.0, "done", "")

    with pytest.raises(FleetError, match="cannot be written .*full.*; free disk space"):
        overfill()
    assert ledger.db.execute("SELECT count(*) FROM spent").fetchone()[0] == 0


def test_what_is_asked_for_finished_subjects_is_kept_by_name_and_settings(ledger):
    quick, thorough = {"generate": "", "evaluate": "quick"}, {"evaluate": "thorough"}
    with ledger.commit():
        ledger.start(1, [0, 3], "w1")
        ledger.finish(0, 1, RESULT), ledger.finish(3, 1, RESULT)
        assert [row[0::2] for row in ledger.open_after(quick)] == [
            (0, "generate"), (0, "evaluate"), (3, "generate"), (3, "evaluate"),
        ]  # fmt: skip
        ledger.note_after(0, "generate", "", "done")
        ledger.note_after(0, "evaluate", "quick", "done")
        ledger.note_after(3, "evaluate", "quick", "IndexError: x")
        assert ledger.open_after(quick) == [(3, "dog", "generate")]
        assert [row[0] for row in ledger.open_after(thorough)] == [0, 3]
        ledger.retry_after(quick)
        assert ledger.open_after(quick) == [(3, "dog", "generate"), (3, "dog", "evaluate")]
    assert ledger.counts_after() == {"evaluate": {"done": 1, "failed": 0}, "generate": {"done": 1, "failed": 0}}
    assert ledger.afterwards() == {"s0": {"generate": "done", "evaluate": "done"}}


def test_a_ledger_of_another_format_is_refused(tmp_path):
    sqlite3.connect(tmp_path / "ledger.sqlite").executescript("PRAGMA user_version=7").close()
    with pytest.raises(DataError, match=f"has format 7, this dbtrain knows {VERSION}"):
        Ledger(tmp_path)


def test_a_subject_is_kept_without_its_photos(tmp_path):
    subject = Subject("a", "dog", (), caption="c", identifier="sks", seed=3, steps=7, lr=0.1, rank=2, prior_weight=0.5)
    assert decode_subject(encode_subject(replace(subject, images=(tmp_path / "a.jpg",)))) == subject


def test_a_subject_of_an_earlier_version_is_read():
    spec = {"id": "a", "class_noun": "dog", "caption": None, "seed": None, "steps": 7, "identifier": "sks"}
    assert decode_subject(json.dumps(spec)) == Subject("a", "dog", (), identifier="sks", steps=7)


def test_the_size_of_a_pack_is_kept_and_a_ledger_without_it_gets_a_place_for_it(tmp_path):
    first = Ledger(tmp_path, create=True)
    with first.commit():
        first.create_run(dict.fromkeys(("config", "config_digest", "manifest", "manifest_digest"), ""), [])
    first.db.execute("ALTER TABLE run DROP COLUMN pack")  # as a dbtrain made it that did not know of packs' size
    first.close()
    looked_at = Ledger(tmp_path)
    assert "pack" not in looked_at.run(), "who only looks changes nothing"
    looked_at.close()
    driven = Ledger(tmp_path, create=True)
    assert driven.pack() is None
    with driven.commit():
        driven.note_pack(8)
    driven.close()
    assert Ledger(tmp_path, create=True).pack() == 8


def test_the_widest_unit_is_of_the_largest_class_and_the_highest_rank(tmp_path):
    ledger = Ledger(tmp_path, create=True)
    subjects = [Subject("a", "dog", (), rank=4), Subject("b", "cat", (), rank=16), Subject("c", "dog", ())]
    with ledger.commit():
        about = dict.fromkeys(("config", "config_digest", "manifest", "manifest_digest"), "")
        ledger.create_run(about, subjects, {"bad": "no photo", "worse": "no photo", "worst": "no photo"})
    assert ledger.widest() == (2, 16)
    ledger.close()


def test_a_class_that_is_given_up_takes_its_waiting_subjects_along(ledger):
    with ledger.commit():
        ledger.start(1, [0], "w1")
        assert ledger.give_up_class("cat", "") == set()
        assert ledger.give_up_class("dog", "priors of 'dog': black") == {1, 2, 3, 4}
    assert ledger.counts() == {
        "waiting": 0, "running": 1, "finished": 0, "quarantined": 4, "cancelled": 0, "skipped": 1, "forgotten": 0,
    }  # fmt: skip
    assert ledger.quarantined(2) == [
        {"subject": name, "cause": None, "reason": "priors of 'dog': black"} for name in ("s1", "s2")
    ]
