"""A request to stop: what a first and a second signal do, and that a training leaves signals as it found them."""

import os
import signal
import threading

import pytest

from dbtrain.errors import StopRequested
from dbtrain.train import train_manifest
from dbtrain.training.job import Job
from dbtrain.training.stopping import STOPS, Stop, signals_as_before
from tests.kit.main_job import small_config, write_job


@pytest.fixture(autouse=True)
def handlers():
    """Signals as at a terminal: pytest-xdist's workers ignore Ctrl-C, and a signal that is ignored stays so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with signals_as_before():
        yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_asks_to_stop_and_a_ctrl_c_after_it_ends_at_once(number, capfd):
    stop = Stop()
    stop.listen()
    assert not stop.asked
    os.kill(os.getpid(), number)
    assert stop.asked and not Stop().asked
    assert ("Ctrl-C again ends at once" in capfd.readouterr().err) == (number == signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    for again in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), again)


def test_a_ctrl_c_that_is_ignored_on_purpose_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = Stop()
    stop.listen()
    os.kill(os.getpid(), signal.SIGINT)
    assert not stop.asked and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_first_ctrl_c_saves_the_step_and_signals_are_as_before(tmp_path, monkeypatch):
    write_job(tmp_path, subjects="rex:dog")
    before, after_step = [signal.getsignal(number) for number in STOPS], Job.after_step

    def pressing(self, engine, done, stop):
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)
        after_step(self, engine, done, stop)

    monkeypatch.setattr(Job, "after_step", pressing)
    with pytest.raises(StopRequested, match="rex: stopped on request after step 3; run the same command"):
        train_manifest(tmp_path / "photos.csv", small_config("sample.images=0"), tmp_path / "out", None, quiet=True)
    (saved,) = (tmp_path / "out/subjects/rex/checkpoints").iterdir()
    assert saved.name == "step-00000003"
    assert [signal.getsignal(number) for number in STOPS] == before


@pytest.mark.parametrize("engine", ["zero", "packed"])
def test_a_thread_trains_and_no_signal_is_touched(tmp_path, engine):
    """As a web application calls it; Python refuses `signal.signal` there."""
    write_job(tmp_path, subjects="rex:dog")
    config, ended = small_config("sample.images=0", f"engine.kind={engine}", "engine.packed.size=1"), []
    before = [signal.getsignal(number) for number in STOPS]

    def work():
        try:
            ended.append(train_manifest(tmp_path / "photos.csv", config, tmp_path / "out", None, quiet=True))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    ((records, failed),) = ended
    assert [record["subject"] for record in records] == ["rex"] and not failed
    assert [signal.getsignal(number) for number in STOPS] == before
