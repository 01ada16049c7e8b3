"""What a run looks like from outside: rows, summary, table and lines."""

import os

import pytest

from dbtrain.errors import DataError
from dbtrain.fleet.status import Screen, read_rows, summarize_run, table
from tests.kit.fleet_run import RESULT, WAITS


def test_reasons_are_words_and_no_markup_and_a_table_begins_with_the_first_summary(ledger, tmp_path, capsys):
    from rich.console import Console

    with ledger.commit():
        ledger.start(1, [0], "w1")
        ledger.fail(0, 1, {**WAITS, "state": "quarantined", "reason": "RuntimeError: [/pytorch/x] closed [bold"})
    with open(os.devnull, "w") as nowhere:
        console = Console(width=140, record=True, file=nowhere)
        console.print(table(summarize_run(tmp_path)))
    assert "RuntimeError: [/pytorch/x] closed [bold" in console.export_text()

    screen = Screen(tmp_path, quiet=False)
    assert screen.live is None
    screen.say("[/x] waits")
    screen.close(summarize_run(tmp_path))
    assert capsys.readouterr().err == "[/x] waits\n"


def test_rows_and_summary_of_a_run(ledger, tmp_path):
    with ledger.commit():
        ledger.start(1, [0, 1], "w1")
        ledger.finish(0, 1, RESULT)
        ledger.fail(1, 1, {**WAITS, "state": "quarantined"})
    rows = {row["subject"]: row for row in read_rows(tmp_path)}
    assert (rows["s0"]["state"], rows["s0"]["stages_s"], rows["s0"]["attempts"]) == ("finished", {"train": 2.0}, 1)
    assert (rows["s1"]["cause"], rows["s1"]["reason"]) == ("crash", "died of SIGABRT")
    assert (rows["bad"]["state"], rows["bad"]["reason"]) == ("skipped", "no photo")
    summary = summarize_run(tmp_path)
    assert summary["subjects"] == {
        "waiting": 3, "running": 0, "finished": 1, "quarantined": 1, "cancelled": 0, "skipped": 1, "forgotten": 0,
    }  # fmt: skip
    assert summary["gpu_seconds"]["train"] == 3.0 and summary["retries"] == {"crash": 1}


def test_a_folder_without_a_run_is_an_error_and_is_left_empty(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        summarize_run(tmp_path)
    assert list(tmp_path.iterdir()) == []
