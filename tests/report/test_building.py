"""The build: what is made, what is kept, what becomes whole at once, and what the pages say."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from PIL import Image

from dbtrain.errors import DataError
from dbtrain.report import build, rebuild
from dbtrain.storage.atomic import LOCK, held
from dbtrain.values import Subject
from tests.kit.made_up_run import make_run
from tests.kit.main_job import dbtrain, start
from tests.report.conftest import page, tree


def test_a_second_build_makes_nothing_and_changes_nothing(run):
    first = rebuild(run)
    before, times = tree(run / "report"), {p: p.stat().st_mtime_ns for p in (run / "report/subjects").rglob("*.*")}
    second = rebuild(run)
    assert (first.made, first.kept, second.made, second.kept) == (5, 0, 0, 5)
    assert tree(run / "report") == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


CHANGES = {
    "record.json": lambda path: path.write_text(path.read_text().replace('"steps": 400', '"steps": 401')),
    "log.jsonl": lambda path: path.write_text(path.read_text() + '{"step": 410, "loss": 0.1}\n'),
    "evaluation.json": lambda path: path.unlink(),
    "config.yaml": lambda path: path.write_text(path.read_text().replace("lr: 0.0001", "lr: 0.0002")),
    "samples/samples/prompt-00-image-00.png": lambda path: Image.new("RGB", (64, 64)).save(path),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_makes_its_subject_anew_and_no_other(run, name):
    rebuild(run)
    CHANGES[name](run / "subjects" / "cat-00001" / name)
    built = rebuild(run)
    assert (built.made, built.kept) == (1, 4)
    incremental = tree(run / "report")
    rebuild(run, fresh=True)
    assert tree(run / "report") == incremental


def test_subjects_come_and_go(run, tmp_path):
    rebuild(run)
    (run / "subjects" / "cat-00001").rename(tmp_path / "gone")
    built = rebuild(run)
    assert (built.subjects, built.made) == (4, 0)
    assert not (run / "report" / "subjects" / "cat-00001").exists()
    (tmp_path / "gone").rename(run / "subjects" / "new")
    assert rebuild(run).made == 1


def test_thumbnails_are_made_once_and_old_ones_leave(run):
    rebuild(run)
    folder = run / "report" / "subjects" / "dog-00000"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.jpg")}
    drawn = run / "subjects" / "dog-00000" / "samples" / "samples" / "prompt-00-image-00.png"
    Image.new("RGB", (300, 200), "red").save(drawn)
    rebuild(run)
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*.jpg")}
    (new,) = after.keys() - before.keys()
    assert Image.open(new).size == (192, 128) and new.name.endswith("-192x128.jpg")
    assert len(before.keys() - after.keys()) == 1
    assert {path: after[path] for path in before.keys() & after.keys()} == {
        path: before[path] for path in before.keys() & after.keys()
    }
    named = set(re.findall(r'src="([0-9a-f]{16}-\d+x\d+\.jpg)"', page(run, "dog-00000")))
    assert named == {path.name for path in after}


def test_photos_are_the_stored_ones_under_their_digest(run):
    build(run)
    content = page(run, "dog-00000")
    assert content.count('alt="Photo ') == 2 and "photos are not shown" not in content
    shard = next((run / "shards").glob("train-*.tar"))
    damaged = bytearray(shard.read_bytes())
    damaged[3000] ^= 1
    shard.write_bytes(damaged)
    rebuild(run, fresh=True)
    hit = [
        path.parent.name
        for path in (run / "report/subjects").rglob("index.html")
        if "photos are not shown" in path.read_text()
    ]
    assert len(hit) == 1  # only the subject whose sample was damaged, and nothing of it is shown


def test_damaged_pictures_are_notes(run):
    (run / "subjects/dog-00000/samples/samples/prompt-00-image-00.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    (run / "subjects/dog-00000/evaluation/tuned-0.png").unlink()
    build(run)
    assert page(run, "dog-00000").count("is not shown") == 2


def test_a_run_without_anything_but_a_record(tmp_path):
    (tmp_path / "subjects" / "rex").mkdir(parents=True)
    (tmp_path / "subjects" / "rex" / "record.json").write_text("{}")
    (tmp_path / "subjects" / "not an id").mkdir()
    (tmp_path / "subjects" / "link").symlink_to(tmp_path)
    assert rebuild(tmp_path).subjects == 1
    (tmp_path / "subjects" / "rex" / "record.json").unlink()
    (tmp_path / "subjects" / "rex").rmdir()
    assert rebuild(tmp_path).subjects == 0


def test_a_run_of_many_subjects_keeps_its_table(run):
    whole = json.loads((run / "evaluation.json").read_text())
    whole["by_subject"] = whole["by_subject"] * 2000  # 10,000 subjects
    (run / "evaluation.json").write_text(json.dumps(whole, indent=1))
    assert (run / "evaluation.json").stat().st_size > 4 * 2**20
    told = build(run).read_text()
    assert "Scores over subjects" in told and f"{whole['macro']['scores']['dino']['value']:.3f}" in told


def test_no_run_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        build(tmp_path)


def test_two_builds_at_once_are_refused(run):
    (run / "report").mkdir()
    with held(run / "report" / ".lock"), pytest.raises(DataError, match="another process builds"):
        build(run)


def test_a_killed_build_is_made_whole_by_the_next(run, monkeypatch):
    whole = tree(build(run).parent)
    (run / "report" / "index.html").write_text("half")
    (run / "report" / "subjects" / "dog-00000" / "index.html").unlink()
    assert rebuild(run).made == 1
    assert tree(run / "report") == whole
    (run / "report" / ".state.json").write_text('{"version"')
    assert rebuild(run).made == 5
    assert tree(run / "report") == whole


def test_readers_never_see_half_a_page(run, monkeypatch):
    build(run)
    seen = []
    real = os.replace

    def watched(source, target):
        if str(target).endswith("index.html"):
            seen.append(Path(target).read_text().rstrip().endswith("</html>") and source != target)
        real(source, target)

    monkeypatch.setattr(os, "replace", watched)
    rebuild(run, fresh=True)
    assert len(seen) == 6 and all(seen)


def test_processes_make_the_same_pages(tmp_path):
    run = make_run(tmp_path / "run", 70, pool=4, judged=False)
    rebuild(run, processes=1)
    alone = tree(run / "report")
    assert rebuild(run, fresh=True, processes=2).made == 70
    assert tree(run / "report") == alone


def test_differences_from_the_run(run):
    own = run / "subjects" / "dog-00000" / "config.yaml"
    own.write_text(own.read_text().replace("steps: 400", "steps: 900"))
    build(run)
    assert re.search(r"train\.steps.*400.*900", page(run, "dog-00000"))
    assert "The same as the run" in page(run, "cat-00001")


def test_the_ledger_tells_states_reasons_and_retries(run, monkeypatch):
    rows = {
        "dog-00000": {"state": "finished", "attempts": 2, "seconds": 12.5, "gpu_seconds": 25.0, "class": "dog"},
        "cat-00001": {"state": "quarantined", "attempts": 3, "reason": "the loss is nan", "cause": "nan"},
        "zoe": {"state": "waiting", "attempts": 0, "class": "cat"},
    }
    monkeypatch.setattr("dbtrain.report.building.read_ledger", lambda run: (rows, {"nan": 3, "killed": 9}))
    built = rebuild(run)
    index = built.index.read_text()
    assert (built.subjects, built.over) == (6, False)
    assert "1 waiting" in index and "1 quarantined" in index and "4 finished" in index
    assert re.search(r"killed.*9.*nan.*3", index, re.S)
    assert "the loss is nan" in page(run, "cat-00001") and "batch retry" in page(run, "cat-00001")
    assert "waiting" in page(run, "zoe")
    rows["zoe"] = {**rows["zoe"], "state": "cancelled"}
    again = rebuild(run)
    assert (again.made, again.over) == (1, True)


def test_a_real_ledger_is_read(tmp_path):
    ledgers = pytest.importorskip("dbtrain.fleet.ledger")
    run = make_run(tmp_path / "run", 2, pool=2, judged=False)
    ledger = ledgers.Ledger(run, create=True)
    with ledger.commit():
        about = dict.fromkeys(("config", "config_digest", "manifest", "manifest_digest"), "x")
        ledger.create_run(about, [Subject(name, "dog", ()) for name in ("dog-00000", "late")])
    ledger.close()
    built = rebuild(run)
    assert built.subjects == 3 and "2 waiting" in built.index.read_text()


def test_pages_of_an_ongoing_run_reload_and_finished_ones_do_not(run):
    (run / "subjects" / "dog-00000" / "record.json").unlink()
    rebuild(run, refresh_s=7)
    index = (run / "report" / "index.html").read_text()
    assert 'data-refresh="7"' in index and '<noscript><meta http-equiv="refresh" content="7"></noscript>' in index
    assert 'data-refresh="7"' in page(run, "dog-00000") and "data-refresh" not in page(run, "cat-00001")
    assert rebuild(run).made == 1
    assert "data-refresh" not in (run / "report" / "index.html").read_text() + page(run, "dog-00000")


def test_the_verb(run):
    told = dbtrain(["report", run, "--json"])
    assert told.returncode == 0
    found = json.loads(told.stdout)
    assert found["made"] == 5 and Path(found["index"]) == run / "report" / "index.html"
    wrong = dbtrain(["report", run / "nowhere"])
    assert (wrong.returncode, wrong.stdout) == (3, "") and "holds no run" in wrong.stderr


@pytest.mark.parametrize("end", ["the run's", "ctrl-c"])
def test_a_watch_ends_with_pages_that_do_not_reload(run, end):
    rebuild(run, refresh_s=2)
    index = run / "report" / "index.html"
    with held(run / LOCK) as ours:  # as a training does
        assert ours
        process = start(["report", run, "--watch", "--every", "1"])
        first = process.stdout.readline()
        assert "0 pages made, 5 unchanged" in first  # that it looks is told, even if there is nothing new
        (run / "subjects" / "cat-00001").rename(run / "subjects" / "renamed")
        made = process.stdout.readline()
        assert "1 pages made" in made and (run / "report" / "subjects" / "renamed" / "index.html").exists()
        assert "data-refresh" in index.read_text()
        if end == "ctrl-c":
            process.send_signal(signal.SIGINT)
            process.wait(100)
    told, complaint = process.communicate(timeout=100)
    assert (process.returncode, "Traceback" in complaint) == (130 if end == "ctrl-c" else 0, False)
    assert "5 subjects" in (made + told).splitlines()[-1]
    assert "data-refresh" not in index.read_text() and "renamed" in index.read_text()


def test_a_fleet_that_still_draws_and_scores_is_not_over(run, monkeypatch):
    rows = {name: {"state": "finished", "after": None} for name in os.listdir(run / "subjects")}
    monkeypatch.setattr("dbtrain.report.building.read_ledger", lambda run: (rows, {}))
    with held(run / LOCK):
        assert not rebuild(run).over
    assert rebuild(run).over
