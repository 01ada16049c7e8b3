"""The bench of a step: every way that can be is measured, the others say why."""

import json

import pytest
import torch

from dbtrain.bench import step
from dbtrain.bench.pack import load, packed
from dbtrain.models.attention import engage_attention
from tests.kit.main_job import small_config

SAID = []


@pytest.fixture(scope="module")
def result():
    plan = step.Plan(("off", "graph"), ("sdpa", "math", "xformers"), (1, 2), steps=1, turns=2)
    return step.measure(small_config("engine.kind=packed"), plan, SAID.append)


def test_each_turn_is_said_at_once(result):
    """A bench that is out of time leaves what it measured until then."""
    assert sum("ms" in row for row in SAID) == 2 * len(result["rows"])
    assert all(row["launches"] > 0 and len(row["ms"]) == 1 for row in SAID if "ms" in row)
    assert {row["why"] for row in SAID if "why" in row} == {row["why"] for row in result["refused"]}


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
    assert by["sdpa", 2]["flop"] == 2 * by["sdpa", 1]["flop"] == 2 * by["math", 1]["flop"]
    assert by["sdpa", 2]["peak_bytes"] > by["sdpa", 1]["peak_bytes"] > 0


def test_the_table_has_a_line_for_each(result):
    text = step.table(result)
    assert text.count("\n| ") == 1 + len(result["rows"]) and text.count("not run: ") == len(result["refused"])
    assert json.loads(json.dumps(result)) == result


def test_a_measured_choice_of_attention_has_a_table(result):
    sides = {"batch": 2, "heads": 4, "queries": 64, "keys": 77, "width": 8, "dtype": "bfloat16", "device": "a GPU"}
    shape = {**sides, "chosen": "flash", "ms": {"sdpa": 0.5, "flash": 0.25}}
    text = step.table({**result, "rows": [{**result["rows"][0], "shapes": [shape]}]})
    assert "| 2x4x64x8 on 77 keys, bfloat16 | 0.5000 ms | 0.2500 ms |  |  | flash |" in text


@pytest.mark.gpu
def test_a_captured_step_trains_as_an_eager_one_does(monkeypatch):
    """The same pack, seeds and batches: the adapters after some steps are equal in every bit. cuDNN's convolutions add
    in any order unless they are told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    masters = []
    for capture in ("off", "graph"):
        torch.manual_seed(0)
        config = step.variant(small_config("train.precision=bf16"), capture, "math")
        base = load(config, False)
        engage_attention(base.models.denoiser, "math", "cuda", "bf16")
        with packed(base, config, 2) as rig:
            for _ in range(8 - rig.pack.warm_steps):
                rig.step()
            masters.append(rig.pack.engine.arenas[0]["master"].clone())
            assert rig.pack.engine.step_N.tolist() == [8, 8]
    assert masters[0].abs().sum() > 0 and torch.equal(*masters)
