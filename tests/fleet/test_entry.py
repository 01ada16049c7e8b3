"""What enters a ledger before any worker starts."""

import json

from dbtrain.fleet.entry import enter_run
from dbtrain.fleet.forgetting import forget
from dbtrain.fleet.ledger import Ledger
from dbtrain.subjects.manifest import scan_manifest
from dbtrain.subjects.sharding import shard_subjects
from tests.kit.main_job import small_config, write_job


def entered(out, manifest, config):
    """The index of a run that enters a fresh ledger, and its subjects as (id, state, reason)."""
    out.mkdir()
    ledger = Ledger(out, create=True)
    try:
        index = enter_run(ledger, manifest, config, out, str, skip_bad=True)
        rows = ledger.db.execute("SELECT id, state, reason FROM subjects ORDER BY id").fetchall()
        return index, [tuple(row) for row in rows]
    finally:
        ledger.close()


def test_every_row_enters_though_its_id_be_none_or_another_but_for_case(tmp_path):
    write_job(tmp_path, subjects="rex:dog tom:cat")
    manifest = tmp_path / "photos.csv"
    manifest.write_text(manifest.read_text() + "../x,dog,rex\nTom,cat,tom\n")
    index, rows = entered(tmp_path / "out", manifest, small_config())
    assert index.subjects == ("rex",)
    assert [row[:2] for row in rows] == [
        ("Tom", "skipped"),
        ("photos.csv:4", "skipped"),
        ("rex", "waiting"),
        ("tom", "skipped"),
    ]
    assert all(("column subject" in reason) == (state == "skipped") for _, state, reason in rows if reason)


def test_a_forgotten_subject_does_not_come_back_with_its_row(tmp_path):
    write_job(tmp_path, subjects="rex:dog tom:cat eve:dog")
    manifest, out, said = tmp_path / "photos.csv", tmp_path / "out", []
    entered(out, manifest, small_config())
    forget(out, ["tom"])
    ledger = Ledger(out)
    index = enter_run(ledger, manifest, small_config(), out, said.append)
    assert index.subjects == ("rex", "eve") and ledger.counts()["waiting"] == 2
    assert any("tom: was forgotten here on request" in line for line in said), said
    assert not any("have no row any more" in line for line in said), said
    manifest.write_text(manifest.read_text() + "ann,cat,eve\n")
    index = enter_run(ledger, manifest, small_config(), out, said.append)
    assert set(index.subjects) == {"rex", "eve", "ann"} and ledger.counts()["waiting"] == 3
    ledger.close()


def test_a_run_on_ready_made_shards_needs_no_photos(tmp_path):
    write_job(tmp_path, subjects="rex:dog tom:cat")
    made = shard_subjects(*scan_manifest(tmp_path / "photos.csv"), tmp_path / "made", small_config(), str)
    manifest = tmp_path / "subjects.csv"
    manifest.write_text("subject,class\nrex,dog\neve,cat\n")
    config = small_config(f"data.shards=file://{tmp_path}/made", "data.schemes=[file]")
    index, rows = entered(tmp_path / "out", manifest, config)
    assert index.entries == made.entries_of("rex")
    assert [row[:2] for row in rows] == [("eve", "skipped"), ("rex", "waiting")]
    assert list(json.loads((tmp_path / "out" / "shards" / "skipped.json").read_text())) == ["eve"]
