"""The bench of a step: every way that can be is measured, the others say why; learning rates of 0 change nothing."""

import json

import pytest
import torch

from dbtrain.bench import step
from tests.main_job import small_config


@pytest.fixture(scope="module")
def result():
    plan = step.Plan(("off", "graph"), ("sdpa", "math", "xformers"), (1, 2), steps=1, turns=2)
    return step.measure(small_config("engine.kind=packed"), plan)


def test_what_can_be_is_measured_and_the_rest_says_why(result):
    assert {(row["capture"], row["runs"], row["subjects"]) for row in result["rows"]} == {
        ("off", name, size) for name in ("sdpa", "math") for size in (1, 2)
    }
    assert len(result["refused"]) == 4
    assert {one["why"].split(":")[0] for one in result["refused"]} == {"engine.capture", "model.attention"}


def test_the_numbers_hang_together(result):
    by = {(row["runs"], row["subjects"]): row for row in result["rows"]}
    for row in result["rows"]:
        assert row["ms"][0] <= row["ms"][1] <= row["ms"][2] and row["flop"] > 0
        assert row["flop_per_s"] == pytest.approx(row["flop"] / row["ms"][1] * 1e3)
        assert row["mfu"] == pytest.approx(row["flop_per_s"] / result["gemm_flop_per_s"])
        assert not row["waits"]
    assert by["sdpa", 2]["launches"] == by["sdpa", 1]["launches"] < by["math", 1]["launches"]
    assert by["sdpa", 2]["flop"] == 2 * by["sdpa", 1]["flop"]


def test_the_table_has_a_line_for_each(result):
    text = step.table(result)
    assert text.count("\n| ") == 1 + len(result["rows"]) and text.count("not run: ") == len(result["refused"])
    assert json.loads(json.dumps(result)) == result


def test_nothing_is_learnt():
    rig = step.make_rig(step.variant(small_config(), "off", "sdpa"), 1)
    before = rig.pack.engine.arenas[0]["master"].clone()
    rig.step()
    assert torch.equal(rig.pack.engine.arenas[0]["master"], before) and rig.pack.engine.live_N.all()


@pytest.mark.gpu
def test_a_captured_step_trains_as_an_eager_one_does():
    """The same pack, seeds and batches: the adapters after some steps are equal in every bit."""
    masters = []
    for capture in ("off", "graph"):
        torch.manual_seed(0)
        rig = step.make_rig(step.variant(small_config("train.precision=bf16"), capture, "math"), 2)
        engine = rig.pack.engine
        engine.arenas[0]["master"].normal_(std=0.01)
        engine.rates_GNS.fill_(1e-3)
        for row in range(2):
            engine.show(row, "master")
        for _ in range(8):
            rig.step()
        masters.append(engine.arenas[0]["master"].clone())
        assert engine.step_N.tolist() == [8, 8]
    assert masters[0].abs().sum() > 0 and torch.equal(*masters)
