"""Tombstones: a forgotten id is known again, and its name is nowhere."""

import pytest

from dbtrain.errors import DataError
from dbtrain.subjects.finding import Finding, defects, notes
from dbtrain.subjects.forgotten import (
    TOMBSTONES,
    bury,
    change_pending,
    not_forgotten,
    read_pending,
    read_tombstones,
    refuse_pending,
)
from dbtrain.values import Subject


def test_a_tombstone_knows_its_id_in_any_case_and_does_not_hold_it(tmp_path):
    bury(tmp_path, ["annabell"])
    stones = read_tombstones(tmp_path)
    assert "annabell" in stones and "Annabell" in stones and "annabel" not in stones and "" not in stones
    assert b"annabell" not in (tmp_path / TOMBSTONES).read_bytes().lower()
    assert bury(tmp_path, ["tom"]).key == stones.key and "annabell" in read_tombstones(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    assert bury(other, ["annabell"]).names != stones.names, "two runs cannot be compared by their tombstones"


def test_rows_of_the_forgotten_are_left_out_with_a_note_and_without_their_faults(tmp_path):
    bury(tmp_path, ["annabell"])
    rows = [Subject("annabell", "dog", ()), Subject("tom", "dog", ())]
    wrong = [Finding("annabell", "a.png", "is no picture", "take it out"), Finding("tom", "b.png", "is dark", "light")]
    left, found = not_forgotten(rows, wrong, tmp_path)
    assert [row.id for row in left] == ["tom"] and defects(found) == wrong[1:]
    assert [(note.subject, note.what) for note in notes(found)] == [
        ("annabell", "was forgotten here on request, and is left out")
    ]


def test_a_damaged_file_of_tombstones_is_refused(tmp_path):
    bury(tmp_path, ["annabell"])
    (tmp_path / TOMBSTONES).write_bytes((tmp_path / TOMBSTONES).read_bytes()[:-9])
    with pytest.raises(DataError, match="is damaged"):
        not_forgotten([], [], tmp_path)


def test_who_is_asked_for_meanwhile_is_not_lost(tmp_path):
    refuse_pending(tmp_path)
    change_pending(tmp_path, {"anna": ["anna"]})
    change_pending(tmp_path, {"tom": ["tom"]})
    change_pending(tmp_path, {}, ["anna"])
    assert read_pending(tmp_path) == {"tom": ["tom"]}
    with pytest.raises(DataError, match="1 subjects are being forgotten; run `dbtrain forget --out"):
        refuse_pending(tmp_path)
    change_pending(tmp_path, {}, ["tom"])
    refuse_pending(tmp_path)
