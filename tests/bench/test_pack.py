"""The comparison runs, its figures belong together, and it leaves the base as it was."""

import json
import sys
import weakref

import pytest
import torch

from dbtrain.bench import pack, step
from dbtrain.bench.flops import count_flops
from dbtrain.models.adapters import layers
from tests.kit.main_job import small_config


def test_solo_and_packs_in_turns(tmp_path):
    config = small_config("train.batch=1")
    base = pack.load(config, False)
    settings = config.model_copy(update={"engine": packed_engine(config)})
    flops = []
    for size in (1, 2):
        with pack.packed(base, settings, size) as rig:
            before = rig.pack.engine.arenas[0]["master"].clone()
            rig.step()
            assert not torch.equal(rig.pack.engine.arenas[0]["master"], before)
            flops.append(count_flops(lambda: rig.pack.advance(rig.batch)))
    assert not layers(base.models.denoiser) and flops[1] == 2 * flops[0]
    result = pack.measure(config, pack.Plan([1, 2], steps=1, turns=1))
    assert result["steps"].keys() == {"solo", "pack 1", "pack 2"}
    for row in result["steps"].values():
        assert row["cost_s"] > 0 and row["peak_bytes"] > 0 and 0 < row["mfu"] < 1
        assert row["times_solo"] == pytest.approx(result["steps"]["solo"]["cost_s"] / row["cost_s"])
    assert result["about"]["flops_a_subject_step"] > 1e6
    assert {"torch", "dbtrain", "commit", "command"} <= result["about"].keys()
    pack.write(tmp_path / "packs", result)
    assert json.loads((tmp_path / "packs.json").read_text())["steps"].keys() == result["steps"].keys()
    assert "| pack 2 |" in (tmp_path / "packs.md").read_text()


def test_a_pack_that_does_not_fit_is_named_and_the_others_are_kept(monkeypatch, tmp_path):
    config = small_config("train.batch=1")
    fits = pack.contestants(config, pack.Plan([1]), "cpu")

    def full(base):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(pack, "contestants", lambda *_: {**fits, "pack 64": (64, full)})
    result = pack.measure(config, pack.Plan([1, 64], steps=1, turns=2))
    assert result["steps"].keys() == {"solo", "pack 1"} and result["about"]["memory ran out"] == "pack 64"
    pack.write(tmp_path / "packs", result)
    assert "memory ran out: pack 64" in (tmp_path / "packs.md").read_text()
    monkeypatch.setattr(pack, "contestants", lambda *_: {"solo": (1, full)})
    with pytest.raises(torch.OutOfMemoryError):
        pack.measure(config, pack.Plan([], steps=1, turns=1))


def test_no_pack_is_held_while_the_next_is_built(monkeypatch):
    """A recorded step keeps its memory for as long as its pack is there, and the next pack would seem not to fit."""
    alive, config = [], small_config("train.batch=1", "engine.kind=packed")

    class Watched(pack.Pack):
        def __init__(self, *arguments):
            assert not [one for one in alive if one() is not None]
            super().__init__(*arguments)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(pack, "Pack", Watched)
    pack.measure(config, pack.Plan([1, 2], steps=1, turns=2))
    step.measure(config, step.Plan(sizes=(1, 2), steps=1, turns=2))
    assert len(alive) == 1 + 2 * 2 * 2 + 2 + 2 * (2 + 1)


def test_without_deepspeed_there_is_no_solo_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    said = []
    result = pack.measure(small_config("train.batch=1"), pack.Plan([1], steps=1, turns=2), said.append)
    assert result["steps"].keys() == {"pack 1"} and result["steps"]["pack 1"]["times_solo"] is None
    assert [(row["name"], row["turn"]) for row in said] == [("pack 1", 0), ("pack 1", 1)]
    assert "| pack 1 | " in pack.table(result)


def packed_engine(config):
    return config.engine.model_copy(update={"kind": "packed"})


def test_the_line_is_the_least_squares_one(monkeypatch):
    """Runs that lie on 5 + 2 classes + 3 S give it back, without residual."""
    monkeypatch.setattr(pack, "whole_run", lambda config, subjects, classes, folder: 5.0 + 2 * classes + 3 * subjects)
    found = pack.line(small_config(), pack.Plan([1], subjects=[1, 4, 8]))
    assert (found["start_s"], found["class_s"], found["subject_s"]) == pytest.approx((5.0, 2.0, 3.0))
    assert found["residual_s"] < 1e-9 and [run[:2] for run in found["runs"]] == [(1, 1), (1, 4), (2, 4), (1, 8), (2, 8)]
