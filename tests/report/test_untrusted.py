"""Runs that are not as dbtrain left them: links, pipes, numbers and dates that no training gives."""

import json
import os
import re
import shutil

import pytest

from dbtrain.errors import DataError
from dbtrain.report import build, rebuild
from tests.kit.made_up_run import make_run
from tests.report.conftest import page, tree


@pytest.mark.parametrize("place", ["report", "report/subjects", "report/subjects/dog-00000"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_a_report_is_never_made_behind_a_link(run, tmp_path, place, kind):
    """What is behind it may be another run, of whose subjects this run knows nothing."""
    other = make_run(tmp_path / "other", 3, pool=2, judged=False)
    build(other)
    for name in ("kept", "gone"):
        shutil.copytree(other / "subjects" / "dog-00000", other / "subjects" / name)
    before = tree(other)
    target = other / place if place != "report/subjects" else other / "subjects"
    (run / place).parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        (run / place).write_text("mine")
    else:
        (run / place).symlink_to(target if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"is a link or a file, want a folder"):
        rebuild(run)
    assert tree(other) == before and not (tmp_path / "nowhere").exists()


def test_only_pages_of_an_earlier_build_are_removed(run):
    rebuild(run)
    mine = run / "report" / "subjects" / "notes"
    mine.mkdir()
    (mine / "todo.txt").write_text("x")
    shutil.rmtree(run / "subjects" / "cat-00001")
    for fresh in (False, True):
        rebuild(run, fresh=fresh)
        assert (mine / "todo.txt").exists() and not (run / "report" / "subjects" / "cat-00001").exists()


def test_a_subject_that_is_a_link_is_left_out_and_named(run, tmp_path, monkeypatch):
    (run / "subjects" / "cat-00001").rename(tmp_path / "cat")
    (run / "subjects" / "cat-00001").symlink_to(tmp_path / "cat")
    monkeypatch.setattr("dbtrain.report.building.read_ledger", lambda run: ({"cat-00001": {}}, {}))
    built = rebuild(run)
    assert built.subjects == 4 and "cat-00001 is left out: subjects/cat-00001 is a link" in built.index.read_text()


def test_files_behind_links_are_not_told(run, tmp_path):
    folder = run / "subjects" / "dog-00000"
    secret = tmp_path / "secret"
    secret.write_text('{"secret": "of another", "step": 1}\n')
    for name in ("config.yaml", "log.jsonl"):
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
    (folder / "record.json").unlink()
    os.mkfifo(folder / "record.json")
    (folder / "samples").rename(tmp_path / "samples")
    (folder / "samples").symlink_to(tmp_path / "samples")
    build(run)
    told = page(run, "dog-00000")
    assert "of another" not in told and told.count("it is a link") == 2 and "record.json is not read" in told
    assert told.count("is not shown: it is no file in this folder") > 0 and 'id="samples"' in told
    assert not re.search(r"samples/[^ ]*png\"", told.partition('id="samples"')[2].partition("</section>")[0])


HOSTILE = [1e308, -1e308, 5e-324, 1e15, 10**400, float("inf"), float("nan"), -0.0]


@pytest.mark.parametrize("value", HOSTILE, ids=str)
def test_no_number_and_no_date_keeps_pages_from_being_made(run, value):
    ends = {"cat-00001": "9999-12-31T23:59:59Z", "teapot-00002": "0001-01-01T00:00:00+23:59"}
    for name, finished in ends.items():
        path = run / "subjects" / name / "record.json"
        record = json.loads(path.read_text())
        numbers = dict.fromkeys(("loss", "steps", "world_size", "peak_memory_gib", "seed"), value)
        stages = {"train": value, "save": 1.0}
        path.write_text(json.dumps({**record, **numbers, "stages_s": stages, "finished": finished}))
        lines = [{"step": i, "loss": value if i % 2 else i, "steps_per_s": value} for i in range(9)]
        path.with_name("log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    built = rebuild(run, price=2.0)
    assert built.made == 5 and "5 finished" in built.index.read_text()
    assert "could not be made" not in built.index.read_text()


def test_a_page_that_cannot_be_made_is_a_note_and_the_others_are_made(run, monkeypatch):
    from dbtrain.report import building

    real = building.read_facts

    def fail_one(folder, subject, ledger):
        if subject == "cat-00001":
            raise KeyError("an odd file")
        return real(folder, subject, ledger)

    monkeypatch.setattr(building, "read_facts", fail_one)
    built = rebuild(run)
    assert built.made == 5 and "cat-00001: its page could not be made: KeyError" in built.index.read_text()
    assert "its files make no page" in page(run, "cat-00001") and 'id="photos"' in page(run, "dog-00000")
    assert rebuild(run).made == 0
