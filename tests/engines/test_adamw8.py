"""AdamW with moments in 8 bits: the levels, and training that goes on to the bit at one rank and at two."""

import math
from functools import cache

import pytest
import torch

from dbtrain.engines.adamw8 import BLOCK, LEAST, PART, AdamW8, decode, encode, levels
from tests.kit.forked import ranks
from tests.kit.main_job import rig, sd_folder, small_config

FULL = ("train.method=full", "train.steps=4")
EIGHT = (*FULL, "train.optimizer=adamw8bit")
CPU = torch.device("cpu")


def numbers(count: int, signed: bool) -> torch.Tensor:
    """Numbers of 30 decades, in blocks that hold large and small ones, zeros alone, and less than can be kept."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(count, generator=generator)
    drawn *= 10.0 ** (torch.randn(count, generator=generator) * 2)
    for block, scale in enumerate((1.0, 1e-12, 1e10, 0.0, LEAST / 1e9, 1e-5)):
        drawn[block * BLOCK : (block + 1) * BLOCK] *= scale
    return drawn if signed else drawn.abs()


@pytest.mark.parametrize("signed", [True, False])
def test_each_number_takes_the_nearest_level_of_its_block(signed):
    """Compared in float64 with all distances; roundings of 1e-6 allowed."""
    values = numbers(7 * BLOCK + 5, signed)
    codes, scales = encode(values, signed)
    got, table = decode(codes, scales, signed).double(), levels(signed, CPU)[0].double()
    assert codes.dtype == torch.uint8 and len(codes) == len(values) and len(scales) == 8 and len(table) == 255
    for first in range(0, len(values), BLOCK):
        block = values[first : first + BLOCK].double()
        scale = float(block.abs().max())
        scale = 0.0 if scale < LEAST else scale
        nearest = (block[:, None] - scale * table).abs().amin(1)
        assert torch.all((got[first : first + BLOCK] - block).abs() <= nearest + 1e-6 * block.abs())
        assert float(got[first : first + BLOCK].abs().max()) == scale


@pytest.mark.parametrize("signed", [True, False])
def test_what_was_rounded_is_not_rounded_again(signed):
    values = numbers(7 * BLOCK + 5, signed)
    codes, scales = encode(values, signed)
    again = encode(decode(codes, scales, signed), signed)
    assert torch.equal(decode(*again, signed), decode(codes, scales, signed)) and torch.equal(again[1], scales)
    flipped = encode(decode(*encode(-values, True), True), True)  # the largest number of a block may be negative
    assert torch.equal(flipped[1], scales) or not signed


def test_parts_change_no_number(monkeypatch):
    """Three parts of a parameter do what one does."""
    made = []
    for part in (PART, BLOCK):
        monkeypatch.setattr("dbtrain.engines.adamw8.PART", part)
        weights = torch.nn.Parameter(numbers(2 * BLOCK + 9, True).clamp(-3, 3))
        adamw = AdamW8([{"params": [weights], "lr": 0.1}], (0.9, 0.999), 1e-8, 0.01)
        adamw.start(weights)
        for step in range(3):
            weights.grad = torch.sin(weights.detach() * 9 + step)
            adamw.step()
        made.append((weights.detach(), *[adamw.state[weights][f"exp_avg{name}"] for name in ("_codes", "_sq_scales")]))
    assert all(map(torch.equal, *made))


@cache
def training(stage: int, words: tuple[str, ...]) -> tuple[list[dict], list[dict], int]:
    """(values of four steps, the states after one, two and four, bytes of moments)."""
    with rig(small_config(*words, f"engine.zero.stage={stage}")) as made:
        values, states = [], []
        for first, last in ((0, 1), (1, 2), (2, 4)):
            values += made.steps(first, last)
            states.append(made.state())
        kept = [tensor for state in made.engine.adamw.state.values() for name, tensor in state.items() if "_" in name]
        return values, states, sum(tensor.numel() * tensor.element_size() for tensor in kept)


def same(got: dict, want: dict) -> bool:
    assert got.keys() == want.keys()
    return all(torch.equal(got[kind][name], want[kind][name]) for kind in want for name in want[kind])


@pytest.mark.parametrize("stage", [0, 3])
def test_a_training_that_goes_on_is_the_unbroken_one(stage):
    values, states, kept = training(stage, EIGHT)
    with rig(small_config(*EIGHT, f"engine.zero.stage={stage}")) as made:
        made.engine.load(states[1], 2)
        assert same(made.state(), states[1]), "reading alters nothing"
        assert made.steps(2, 4) == values[2:]
        assert same(made.state(), states[2])
        sizes = [partition.numel() for partition in made.engine._partitions()]
    assert kept == sum(2 * (size + 4 * math.ceil(size / BLOCK)) for size in sizes)


def test_its_training_is_close_to_that_of_fp32_moments():
    """Step 1 reads moments of 0, which are exact: its weights are those of `torch.optim.AdamW` in every bit. Then a
    moment is off by half the gap between two levels at most: 5 % of it in the block's upper decade. The losses of four
    steps were 7e-6 apart."""
    plain, eight = training(0, FULL), training(0, EIGHT)
    assert same({"master": eight[1][0]["master"]}, {"master": plain[1][0]["master"]})
    assert not same(eight[1][0], plain[1][0])
    assert [one["loss"] for one in eight[0]] == pytest.approx([one["loss"] for one in plain[0]], rel=1e-4)
    assert plain[2] == 8 * sum(value.numel() for value in plain[1][0]["master"].values())


def _on_this_rank(folder) -> None:
    """Four steps of ZeRO stage 2, and the last two again by an engine that loads the state after two."""
    import torch.distributed as dist

    config = small_config(*EIGHT, "engine.zero.stage=2", f"model.path={folder / 'base'}")
    with rig(config) as made:
        values = made.steps(0, 2)
        middle = made.state()
        values += made.steps(2, 4)
        states = [middle, made.state()]
        moments = [len(state["exp_avg_codes"]) for state in made.engine.adamw.state.values()]
    if made.engine.world.first:
        torch.save(middle, folder / "middle")
    dist.barrier()
    with rig(config) as made:
        made.engine.load(torch.load(folder / "middle"), 2)
        again = made.steps(2, 4)
        states.append(made.state())
    torch.save((values, again, states, moments), folder / f"rank-{made.engine.world.rank}")


def test_two_ranks_share_the_moments_and_go_on_to_the_bit(tmp_path):
    """With other blocks than one rank's, their losses are one rank's within the bound of that to fp32 moments."""
    (tmp_path / "base").symlink_to(sd_folder())
    ranks(2, _on_this_rank, tmp_path)
    (values, again, states, moments), (*_, others) = (torch.load(tmp_path / f"rank-{rank}") for rank in (0, 1))
    assert again == values[2:] and same(states[2], states[1]) and not same(states[1], states[0])
    alone, (_, middle, _), _ = training(0, EIGHT)
    assert [one["loss"] for one in values] == pytest.approx([one["loss"] for one in alone], rel=1e-4)
    weights = sum(value.numel() for value in middle["master"].values())
    assert moments == others and sum(moments) == pytest.approx(weights / 2, abs=8)
