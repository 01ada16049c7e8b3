"""Measurements: rates that add up, a log that goes on after a resume, sinks that open only when asked."""

import json
import math
import sys
import time
from types import SimpleNamespace

import pytest

from dbtrain.errors import ConfigError
from dbtrain.settings.config import RunConfig, TrackConfig
from dbtrain.training import telemetry
from dbtrain.training.telemetry import JsonLines, Meter, Progress, open_sinks, peak_memory_gib

VALUES = {"loss": 0.5, "lr": 1e-4, "images_per_s": 8.0, "steps_per_s": 2.0, "data_wait_share": 0.25, "memory_gib": 1.0}


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)

    def fail_after(seconds):
        now.s += seconds
        raise ValueError

    now.fail_after = fail_after
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: now.s)
    return now


def test_a_meter_gives_means_and_rates_of_its_interval(clock):
    meter = Meter()
    for loss in (1.0, 3.0):
        clock.s += 2
        meter.add(8, 0.5, {"loss": loss})
    got = {"loss": 2.0, "images_per_s": 4.0, "steps_per_s": 0.5, "data_wait_share": 0.25}
    assert meter.read() == got
    meter.reset()
    clock.s += 1
    meter.add(8, 0.0, {"loss": 5.0})
    assert meter.read() == {"loss": 5.0, "images_per_s": 8.0, "steps_per_s": 1.0, "data_wait_share": 0.0}


def test_a_nan_is_not_averaged_away():
    meter = Meter()
    for loss in (1.0, math.nan, 1.0):
        meter.add(1, 0, {"loss": loss})
    assert math.isnan(meter.read()["loss"])


def test_the_log_goes_on_where_it_ended_and_is_readable_at_once(tmp_path):
    for step in (1, 2):
        sink = JsonLines(tmp_path / "log.jsonl")
        sink.log(step, {"loss": step / 2})
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1]) == {"step": step, "loss": step / 2}
        sink.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


class Recorder:
    """Stands for wandb or trackio."""

    def __init__(self):
        self.calls = []

    def init(self, **settings):
        self.calls.append(("init", settings["project"], settings["name"], settings["config"]["train"]["steps"]))

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_run_its_values_and_its_end(tmp_path, monkeypatch, name):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, name, recorder)
    config = RunConfig(track=TrackConfig(tensorboard=False, **{name: "mine"}))
    sinks = open_sinks(config, tmp_path, "rex")
    for sink in sinks:
        sink.log(3, {"loss": 1.0})
        sink.close()
    assert recorder.calls == [("init", "mine", "rex", 800), ("log", 3, {"loss": 1.0}), ("finish",)]
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 3, "loss": 1.0}


def test_a_tracker_that_is_missing_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = RunConfig(track=TrackConfig(tensorboard=False, wandb="mine"))
    with pytest.raises(ConfigError, match=r"track.wandb: wandb is not installed; pip install 'dbtrain\[trackers\]'"):
        open_sinks(config, tmp_path, "rex")


def test_tensorboard_can_be_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for sink in open_sinks(RunConfig(), tmp_path, "rex"):
        sink.log(1, {"loss": 0.5})
        sink.log(2, {"loss": 0.25})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    (text,) = events.Tensors("config/text_summary")
    assert b'"steps": 800' in text.tensor_proto.string_val[0]


def test_plain_lines_off_a_terminal_and_none_when_quiet(capsys):
    Progress("rex", 100, 0).report(20, VALUES)
    line = capsys.readouterr().err
    assert line.startswith("rex  20/100  loss 0.5000  lr 1.0e-04  8.0 images/s  wait 25%  1.0 GiB  ETA 40 s")
    Progress("rex", 100, 0, quiet=True).report(20, VALUES)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_live_bar_that_ends(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress("rex", 100, 10)
    assert progress.bar.tasks[0].completed == 10
    progress.advance(20)
    progress.report(20, VALUES)
    assert progress.bar.tasks[0].completed == 20
    assert "loss 0.5000" in progress.bar.tasks[0].fields["status"]
    progress.close()
    assert not progress.bar.live.is_started


def test_peak_memory_is_this_process_in_gib():
    held = bytearray(64 * 2**20)
    peak = peak_memory_gib("cpu")
    assert len(held) / 2**30 < peak < 64
    assert time.perf_counter() > 0


def test_a_missing_tracker_is_told_without_loading_any(monkeypatch):
    from dbtrain.training import telemetry

    monkeypatch.setattr(telemetry, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as raised:
        telemetry.refuse_trackers(TrackConfig(wandb="a", trackio="b"))
    assert [finding.partition(":")[0] for finding in raised.value.findings] == ["track.wandb", "track.trackio"]
    telemetry.refuse_trackers(TrackConfig())
