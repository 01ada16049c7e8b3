"""A small ledger for the fleet's tests."""

import pytest

from tests.kit.fleet_run import run_of_dogs


@pytest.fixture
def ledger(tmp_path):
    """Of a run of five dogs, s0 to s4, that wait, and a subject that was left out."""
    with run_of_dogs(tmp_path, 5, {"bad": "no photo"}) as opened:
        yield opened
