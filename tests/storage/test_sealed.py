"""Sealed lines come back equal, and no change of a single byte passes."""

import json

import pytest

from dbtrain.storage.sealed import seal, unseal

LINES = [{"format": 1}, ["rex-0-0", 512, "a photo\nof a dog"], "é", None]


def test_lines_come_back_equal_and_equal_lines_give_equal_bytes():
    assert unseal(seal(LINES)) == LINES
    assert seal(iter(LINES)) == seal(LINES)
    assert unseal(seal([])) == []


def test_every_changed_byte_and_every_cut_is_noticed_before_anything_is_parsed(monkeypatch):
    content = seal(LINES)
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("parsed"))
    for place in range(len(content)):
        bad = bytearray(content)
        bad[place] ^= 1
        for damaged in (bytes(bad), content[:place]):
            with pytest.raises(ValueError, match="its digest differs"):
                unseal(damaged)
