"""A run's numbers for Prometheus."""

import pytest

pytest.importorskip("ray")

from dbtrain.fleet.gauges import Gauges


def test_a_state_without_workers_counts_none():
    gauges = Gauges()
    assert gauges.workers([{"state": "busy"}, {"state": "busy"}, {"state": "idle"}]) == {"busy": 2, "idle": 1}
    assert gauges.workers([{"state": "idle"}]) == {"busy": 0, "idle": 1}
