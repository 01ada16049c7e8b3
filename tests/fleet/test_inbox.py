"""Requests to a run from another terminal."""

import pytest

from dbtrain.errors import DataError
from dbtrain.fleet.inbox import request, take_requests
from dbtrain.fleet.lease import Lease


def test_requests_apply_now_or_wait_for_the_driver(ledger, tmp_path):
    assert request(tmp_path, "cancel", ["s1", "s2"]) == 2
    assert request(tmp_path, "cancel", ["s1"]) == 0
    assert request(tmp_path, "retry", None) == 2
    with pytest.raises(DataError, match="no subject 'zebra'"):
        request(tmp_path, "retry", ["zebra"])
    lease = Lease(tmp_path)
    assert request(tmp_path, "cancel", ["s3"]) is None
    (letter,) = (tmp_path / "requests").iterdir()
    twice = letter.read_bytes()
    assert take_requests(ledger, tmp_path) == [("cancel", [(3, "dog")])]
    assert take_requests(ledger, tmp_path) == [], "a request is taken once"
    letter.write_bytes(twice)  # a driver was killed between its commit and the removal
    assert take_requests(ledger, tmp_path) == [("cancel", [])]
    lease.release()
