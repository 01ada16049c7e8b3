"""Every second belongs to one stage, and the subjects' shares add up to the whole."""

import pytest

from dbtrain.packing.clock import Clock
from dbtrain.training.telemetry import Stages


def test_stages_sum_to_the_wall_and_shares_to_the_stages():
    moments = iter([10.0, 11.0, 15.0, 17.0, 18.5])
    clock = Clock(Stages(), {"load": 6.0, "shard": 2.0}, lambda: next(moments))
    clock.lap("prior")
    rex, tom = clock.common(2), clock.common(2)
    clock.lap("train", [rex, tom], 4)
    clock.lap("train", [rex], 4)
    clock.lap("save", [tom])
    total = clock.stages.seconds
    assert total == {"load": 6.0, "shard": 2.0, "prior": 1.0, "train": 2.5, "idle": 3.5, "save": 1.5}
    assert sum(total.values()) == pytest.approx(8.0 + 18.5 - 10.0)
    assert rex == {"load": 3.0, "shard": 1.0, "prior": 0.5, "train": 1.5, "idle": 2.5}
    assert {stage: rex.get(stage, 0) + tom.get(stage, 0) for stage in total} == total
