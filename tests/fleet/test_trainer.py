"""How a trainer speaks."""

from dbtrain.fleet.messages import Beat
from dbtrain.fleet.trainer import _beat


def test_a_trainer_beats_at_most_so_often_and_says_its_stage(monkeypatch):
    now, sent = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    beat = _beat(sent.append)
    for seconds, stage in ((0.0, "load"), (0.1, "train"), (0.15, "save"), (0.0, "save")):
        now[0] += seconds
        beat(stage)
    assert sent == [Beat("load"), Beat("save")]
