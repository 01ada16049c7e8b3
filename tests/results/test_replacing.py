"""A new result takes the place of the old one whole, wherever the process is killed."""

import os

import pytest

from dbtrain.results.record import RECORD, finished_record, write_record
from dbtrain.results.replacing import NEXT, take_place

ABOUT = dict.fromkeys(("subject", "class", "identifier", "run", "base", "base_digest"), "rex")


def publish(folder, content, names, sheets=1):
    """A result in a folder."""
    single = folder / "samples" / "samples"
    single.mkdir(parents=True)
    for number in range(sheets):
        (single / f"prompt-00-image-0{number}.png").write_bytes(content)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_record(folder, ABOUT, [folder / name for name in names])


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
        if path.is_file() and path.name != RECORD
    }  # fmt: skip


@pytest.fixture
def rex(tmp_path):
    """An old result, a new one beside it, and what else a subject's folder holds."""
    publish(tmp_path / "rex", b"old", ["weights", "samples.png", "kohya"], sheets=2)
    (tmp_path / "rex" / "log.jsonl").write_bytes(b"log")
    (tmp_path / "rex" / "samples" / "generated").mkdir()
    (tmp_path / "rex" / "samples" / "generated" / "a.png").write_bytes(b"kept")
    (tmp_path / "rex" / "samples" / "samples-small").mkdir()
    (tmp_path / "rex" / "samples" / "samples-small" / "prompt-01-image-00.png").write_bytes(b"old")
    publish(tmp_path / "rex" / NEXT, b"new", ["weights", "samples.png", "model/unet/weights"])
    return tmp_path / "rex"


NEW = {
    **dict.fromkeys(("weights", "samples.png", "model/unet/weights", "samples/samples/prompt-00-image-00.png"), b"new"),
    "log.jsonl": b"log",
    "samples/generated/a.png": b"kept",
}


def test_the_new_result_is_there_and_nothing_of_the_old_one(rex):
    take_place(rex)
    assert content(rex) == NEW and not (rex / NEXT).exists()
    assert set(finished_record(rex)["files"]) == {"weights", "samples.png", "model/unet/weights"}
    take_place(rex)
    assert content(rex) == NEW


def test_a_result_that_is_not_whole_goes_and_the_old_one_stays(rex):
    (rex / NEXT / RECORD).unlink()
    take_place(rex)
    assert not (rex / NEXT).exists()
    assert set(finished_record(rex)["files"]) == {"weights", "samples.png", "kohya"}
    assert set(content(rex).values()) == {b"old", b"log", b"kept"}


def test_a_kill_at_any_rename_is_made_good_by_the_next_process(rex, monkeypatch):
    made, replace = 0, os.replace

    def killed(source, target):
        nonlocal made
        if made == allowed:
            raise SystemExit
        made += 1
        replace(source, target)

    for allowed in range(5):
        made = 0
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            take_place(rex)
        if allowed == 2:
            break
    monkeypatch.undo()
    take_place(rex)
    assert content(rex) == NEW and finished_record(rex)


def test_a_damaged_old_record_does_not_keep_the_new_result_out(rex):
    (rex / RECORD).write_text("{")
    take_place(rex)
    assert finished_record(rex)["files"].keys() == {"weights", "samples.png", "model/unet/weights"}
