"""Every second belongs to one stage, and the subjects' shares add up to the whole."""

import pytest

from dbtrain.training.clock import Clock


def test_stages_sum_to_the_wall_and_shares_to_the_stages():
    moments = iter([3.0, 10.0, 11.0, 15.0, 17.0, 18.5])
    before = Clock(now=lambda: next(moments))
    before.seconds |= {"load": 6.0, "shard": 2.0}
    clock = before.continued()
    assert before.seconds == {}
    clock.lap("prior")
    rex, tom = clock.common(2), clock.common(2)
    clock.lap("train", [rex, tom], 4)
    clock.lap("train", [rex], 4)
    clock.lap("save", [tom])
    total = clock.seconds
    assert total == {"load": 6.0, "shard": 2.0, "prior": 1.0, "train": 2.5, "idle": 3.5, "save": 1.5}
    assert sum(total.values()) == pytest.approx(8.0 + 18.5 - 10.0)
    assert rex == {"load": 3.0, "shard": 1.0, "prior": 0.5, "train": 1.5, "idle": 2.5}
    assert {stage: rex.get(stage, 0) + tom.get(stage, 0) for stage in total} == total


def test_a_stage_counts_its_block_and_beats_before_it_and_also_where_it_fails():
    moments, beats = iter([0.0, 1.0, 3.0, 10.0, 14.0]), []
    clock = Clock(beats.append, lambda: next(moments))
    with clock.stage("load"):
        assert beats == ["load"]
    with pytest.raises(ZeroDivisionError), clock.stage("load"):
        raise ZeroDivisionError
    assert clock.seconds == {"load": 6.0} and beats == ["load", "load"]
