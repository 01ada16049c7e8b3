"""Uploads while training goes on: stores that fail, are slow, cut, are full or gone; and what a run says at its end."""

import threading
import time

import pytest

from dbtrain.errors import ConfigError, StopRequested
from dbtrain.results import uploading
from dbtrain.results.uploading import DOWN, Uploads, refuse_address
from dbtrain.settings.config import PublishConfig
from tests.kit.object_store import BUCKET, object_store
from tests.kit.published import make_result
from tests.results.test_upload import contents, in_store, whole_or_none

URL = f"s3://{BUCKET}/all"


@pytest.fixture(scope="module")
def server():
    with object_store() as made:
        yield made


@pytest.fixture
def store(server, monkeypatch):
    monkeypatch.setattr(uploading, "PAUSES_S", (0.01, 0.01))
    server.clear()
    return server


@pytest.fixture
def folders(tmp_path):
    return [make_result(tmp_path / "out" / name, files=("weights.bin",)) for name in ("rex", "tom", "zoe")]


def uploaded(store, folders):
    return {folder.name for folder in folders if in_store(store, f"all/{folder.name}/") == contents(folder)}


def watched(store, folders, behave):
    """A store that behaves in some way, and keeps what is at fault at any request."""

    def each(number, environ):
        for folder in folders:
            if problem := whole_or_none(in_store(store, f"all/{folder.name}/")):
                store.problems.append(f"request {number}: {folder.name}: {problem}")
        return behave(number, environ)

    store.behave = each


BEHAVIOURS = {
    "fails now and then": lambda number, environ: 503 if number % 17 == 0 else None,
    "cuts now and then": lambda number, environ: "cut" if number % 19 == 0 else None,
    "is slow": lambda number, environ: time.sleep(0.02),
    "refuses records at first": lambda number, environ: (
        500 if number < 30 and environ["REQUEST_METHOD"] == "PUT" and "record" in environ["PATH_INFO"] else None
    ),
}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_result_arrives_once_and_whole(store, folders, behaviour):
    watched(store, folders, BEHAVIOURS[behaviour])
    said, turns = [], 0
    while True:
        uploads = Uploads(URL, said.append)
        uploads.add(folders)
        left, turns = uploads.finish(), turns + 1
        if not left:
            break
        assert turns < 8 and all("the same command again uploads it" in str(error) for error in left.values())
    assert uploaded(store, folders) == {"rex", "tom", "zoe"} and store.problems == []
    told = [line for line in said if "uploaded to" in line]
    assert len(told) == len(set(told)) <= len(folders)


@pytest.mark.parametrize("status", [507, 403, 404])
def test_a_store_that_is_full_or_refuses_fails_no_training(store, folders, status):
    store.behave = lambda number, environ: status if environ["REQUEST_METHOD"] == "PUT" else None
    uploads = Uploads(URL, lambda line: None)
    uploads.add(folders)
    left = uploads.finish()
    assert set(left) == {"rex", "tom", "zoe"} and left["rex"].exit_code == 3
    assert f"is finished here, and not yet at {URL}" in str(left["rex"]) and store.objects() == {}
    store.behave = lambda number, environ: None
    uploads.add(folders)
    assert uploads.finish() == {} and uploaded(store, folders) == {"rex", "tom", "zoe"}


def test_what_failed_is_tried_again_at_the_end(store, folders):
    store.behave = lambda number, environ: 500
    uploads = Uploads(URL, lambda line: None)
    uploads.add(folders)
    while len(uploads.failed) < 3:
        time.sleep(0.01)
    assert uploads.left == f", 3 finished results are not at {URL} yet"
    store.behave = lambda number, environ: None
    assert uploads.finish() == {} and uploads.left == ""


def test_a_store_that_is_down_is_not_waited_for(store, tmp_path):
    store.behave = lambda number, environ: 500
    uploads = Uploads(URL, lambda line: None)
    uploads.add(make_result(tmp_path / "out" / f"s{number}", files=()) for number in range(60))
    assert len(uploads.finish()) == 60
    assert len(store.requests) < 60 + 3 * DOWN  # each once or thrice while it ran, and a few at the end


def test_a_stop_is_obeyed_while_the_end_waits(store, folders):
    gate = threading.Event()
    store.behave = lambda number, environ: gate.wait(20) and None
    uploads = Uploads(URL, lambda line: None)
    uploads.add(folders)
    try:
        with pytest.raises(StopRequested, match="3 finished results are not at"):
            uploads.finish(lambda: True)
    finally:
        gate.set()


def test_training_is_not_kept_waiting(store, folders):
    gate = threading.Event()
    store.behave = lambda number, environ: gate.wait(20) and None
    uploads = Uploads(URL, lambda line: None)
    begun = time.monotonic()
    uploads.add(folders)
    assert time.monotonic() - begun < 15 and uploads.open == {"rex", "tom", "zoe"}
    gate.set()
    assert uploads.finish() == {}


def test_the_end_says_what_it_waits_for(store, folders, monkeypatch):
    monkeypatch.setattr(uploading, "LINE_S", 0.0)
    watched(store, folders, BEHAVIOURS["is slow"])
    said = []
    uploads = Uploads(URL, said.append)
    uploads.add(folders[:1])
    uploads.finish()
    assert f"waiting, 1 finished results are not at {URL} yet" in said


def test_an_address_that_cannot_be_used_is_not_tried_twice(folders):
    said = []
    uploads = Uploads("ftp://host/x", said.append)
    uploads.add(folders[:1])
    assert "cannot be used" in str(uploads.finish()["rex"]) and len(said) <= 2


def test_addresses_are_looked_at_before_any_work(tmp_path):
    for good in (None, str(tmp_path / "none"), "memory://all"):
        refuse_address(PublishConfig(to=good))
    with pytest.raises(ConfigError, match="publish.to"):
        refuse_address(PublishConfig(to="https://host/x"))


def test_without_an_address_nothing_is_done(folders):
    uploads = Uploads(None, print)
    uploads.add(folders)
    assert uploads.finish() == {} and uploads.left == ""


def test_subjects_that_are_left_out_are_waited_for_and_not_sent_again(folders, monkeypatch, tmp_path):
    begun, goes_on, sent, address = threading.Event(), threading.Event(), [], str(tmp_path / "store")

    def slow(folder, url):
        if url != address:  # a thread that an earlier test left behind, at its last try
            raise ConfigError("not this test's")
        begun.set()
        goes_on.wait(10)
        sent.append(folder.name)
        return True

    monkeypatch.setattr(uploading, "upload", slow)
    uploads = Uploads(address, lambda line: None)
    uploads.add(folders[:1])
    assert begun.wait(10)
    threading.Timer(0.3, goes_on.set).start()
    uploads.leave({"rex"})
    assert sent == ["rex"], "it was under way, and its end was waited for"
    uploads.add(folders)
    assert uploads.finish() == {} and sorted(sent) == ["rex", "tom", "zoe"], "rex is not sent again"
