"""The bench of the operations: its rows are the operations' table, its bytes are arithmetic, launches are counted."""

import json

import pytest
import torch

from dbtrain.bench import ops
from dbtrain.bench.flops import count_flops
from dbtrain_kernels import OPS


@pytest.fixture(scope="module")
def rows():
    return ops.counts()


def test_every_operation_has_work_and_a_row_for_each_shape(rows):
    assert {name for name, _ in ops.work()} == set(OPS)
    assert [(row["op"], row["shape"]) for row in rows] == [(name, case.name) for name, case in ops.work()]


def test_bytes_are_those_of_the_tensors(rows):
    moved = {(row["op"], row["shape"]): row["bytes"] for row in rows}
    elements = 2 * 4 * 64 * 64
    assert moved["noising", "SD1.5, 1+1"] == elements * 4 * 5  # two moments read, x, eps and x_t written
    assert moved["adamw", "LoRA r16, 1"] == 3_190_000 * 32  # g twice; p, m, v read and written
    assert moved["lora", "SD1.5 4096 tokens, 8"] == 8 * moved["lora", "SD1.5 4096 tokens, 1"]


def test_kernels_are_fewer_than_plain_operators_and_independent_of_the_pack(rows):
    several = ("group_norm",)  # its plain operators start 3 and 4 kernels each: see `bench.gpu_forms.SEVERAL`
    assert all(row["fused"] < row["reference"] for row in rows if row["op"] not in several)
    found = {}
    for row in rows:
        found.setdefault((row["op"], row["shape"].split()[0].strip(",")), set()).add((row["fused"], row["reference"]))
    assert {name for name, _ in found} == {*OPS} and {len(counts) for counts in found.values()} == {1}


def test_the_table_says_what_needs_a_gpu(rows):
    text = ops.table({"counts": rows})
    assert text.count("\n| ") >= len(rows) and "No CUDA device" in text
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("name", OPS)
def test_the_inputs_fit_the_operations(name):
    """The first shape of each runs forward and backward, by its plain form."""
    case = OPS[name].load("work")()[0]
    ops.call(name, OPS[name].load("reference"), case.inputs(device="meta"))()


def test_flops_of_a_call_are_those_of_its_products():
    """Two products forward and four in backward, of 2 * 4096 tokens, width 320 and rank 16."""
    case = OPS["lora"].load("work")()[0]
    run = ops.call("lora", OPS["lora"].load("fused"), case.inputs(device="meta"))
    assert count_flops(run) == 6 * 2 * (2 * 4096) * 320 * 16


def test_a_timed_table_is_printed():
    timing = {"op": "loss", "shape": "x", "form": "fused", "replayed": True, "ms": [1.0, 2.0, 3.0]}
    timing |= {"copy_share": 0.5, "gemm_share": 0.01, "peak_mib": 3.0}
    top = {"copy_bytes_per_s": 3e12, "gemm_flop_per_s": 7e14}
    text = ops.table({"counts": [], "device": "a GPU", "ceilings": top, "timings": [timing]})
    assert "3,000 GB/s and 700 TFLOP/s" in text and "1.0000 2.0000 3.0000 | 50% | 1.0%" in text


@pytest.mark.gpu
def test_the_ceilings_are_those_of_a_gpu():
    top = ops.ceilings()
    assert top["copy_bytes_per_s"] > 1e11 and top["gemm_flop_per_s"] > 1e13
    x = torch.ones(3, device="cuda")
    replay, graphed = ops.replayed(lambda: x.add_(1))
    before = x.clone()
    assert ops.quantiles_ms(replay, 5)[1] > 0 and graphed and (x > before).all()
    assert not ops.replayed(lambda: x.sum().item())[1]
