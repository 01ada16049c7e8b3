"""Arenas as storage: rows in and out, other names, groups that share one clip, bf16 copies of fp32 masters."""

import math

import pytest
import torch
from torch import nn

from dbtrain.engines.engine import ParamGroup
from dbtrain.engines.packed import PackedEngine, RowSettings
from dbtrain.errors import EngineError
from dbtrain.settings.config import TrainConfig

LR, TEXT_LR, CLIP = 1e-2, 3e-3, 1.0


def groups(rows=2, dtype=torch.float32):
    def params(*names):
        return {name: nn.Parameter(torch.zeros(rows, 3, 4, dtype=dtype)) for name in names}

    return [ParamGroup(params("unet.a", "unet.b"), LR), ParamGroup(params("text.a"), TEXT_LR)]


def engine_of(made, dtype=torch.float32, **train):
    return PackedEngine(made, TrainConfig(clip_norm=CLIP, **train), 5, dtype)


def state(seed, *shapes, names=("unet.a", "unet.b", "text.a")):
    draw = torch.Generator().manual_seed(seed)
    return {"master": {name: torch.randn(1, *(shapes or ((3, 4),))[0], generator=draw) for name in names}}


def settings(steps=5, clip=CLIP):
    return RowSettings([[LR] * steps, [TEXT_LR] * steps], clip, 0.01)


def test_groups_are_clipped_by_their_joint_norm_and_have_their_own_rates():
    """Against AdamW and clip_grad_norm_ over both groups together; each group's own norm would clip otherwise."""
    made = groups()
    engine = engine_of(made)
    engine.load(1, state(0), 0, settings())
    ours = [
        {name: param[1].detach().clone().requires_grad_() for name, param in group.params.items()} for group in made
    ]
    adamw = torch.optim.AdamW(
        [{"params": list(own.values()), "lr": group.lr} for own, group in zip(ours, made)], weight_decay=0.01
    )
    draw = torch.Generator().manual_seed(1)
    for step in range(5):
        for group, own in zip(made, ours):
            for name, param in group.params.items():
                grad = torch.randn(3, 4, generator=draw) * (0.1 if step == 3 else 0.3)
                param.grad[1] += grad
                own[name].grad = grad.clone()
        norm = nn.utils.clip_grad_norm_([param for own in ours for param in own.values()], CLIP)
        assert (norm > CLIP) == (step != 3)
        adamw.step()
        assert engine.update(torch.tensor([True, True]))[1].item() == pytest.approx(norm.item(), rel=1e-6)
        for group, own in zip(made, ours):
            for name, param in group.params.items():
                # float32: a few roundings a step of numbers of size one.
                assert torch.allclose(param[1], own[name], rtol=0, atol=(step + 1) * 2.0**-22), (step, name)
                assert (param[0] == 0).all() and (param.grad == 0).all()
    assert engine.step_N.tolist() == [0, 5] and not engine.live_N.any()


def test_a_bad_number_in_one_group_stops_the_other_too():
    made = groups()
    engine = engine_of(made)
    for row in (0, 1):
        engine.load(row, state(row), 0, settings())
    before = engine.state(0)
    for group in made:
        for param in group.params.values():
            param.grad.fill_(0.1)
    made[1].params["text.a"].grad[0, 0, 0] = math.inf
    engine.update(torch.tensor([True, True]))
    after = engine.state(0)
    assert all(torch.equal(after[kind][name], before[kind][name]) for kind in before for name in before[kind])
    assert engine.failed_N.tolist() == [True, False] and engine.step_N.tolist() == [0, 1]
    engine.load(0, state(7), 2, settings())
    assert engine.failed_N.tolist() == [False, False] and engine.live_N.tolist() == [True, True]


def test_a_smaller_matrix_comes_back_as_it_went_in():
    engine = engine_of(groups(), ema=0.9)
    small = state(0, (2, 3))
    small["exp_avg"] = {name: torch.randn_like(matrix) for name, matrix in small["master"].items()}
    engine.load(0, state(1), 3, settings())
    engine.load(0, small, 4, settings())
    got = engine.state(0)
    assert got.keys() == {"master", "exp_avg", "exp_avg_sq", "ema"}
    for name, matrix in small["master"].items():
        assert torch.equal(got["master"][name], matrix) and torch.equal(got["ema"][name], matrix)
        assert torch.equal(got["exp_avg"][name], small["exp_avg"][name])
        assert torch.equal(got["exp_avg_sq"][name], torch.zeros_like(matrix))
    whole = engine.arenas[0].view(engine.arenas[0]["master"], "unet.a")[0]
    assert (whole[2:] == 0).all() and (whole[:, 3:] == 0).all()


def test_a_state_of_other_layers_is_refused():
    engine = engine_of(groups())
    with pytest.raises(EngineError, match=r"such as text\.a; were lora\.targets changed"):
        engine.load(0, state(0, names=("unet.a", "unet.b")), 0, settings())


def test_bf16_copies_follow_fp32_masters():
    made = groups()
    engine = engine_of(made, torch.bfloat16)
    engine.load(0, state(0), 0, settings())
    param = made[0].params["unet.a"]
    assert param.dtype == param.grad.dtype == torch.bfloat16 and engine.arenas[0]["master"].dtype == torch.float32
    for _ in range(3):
        for group in made:
            for one in group.params.values():
                one.grad.fill_(0.25)
        engine.update(torch.tensor([True, True]))
    for arena in engine.arenas:
        assert torch.equal(arena.compute, arena["master"].bfloat16())
        assert not torch.equal(arena["master"], arena.compute.float())  # the masters keep what bf16 cannot
    assert not torch.equal(engine.state(0)["master"]["unet.a"], state(0)["master"]["unet.a"])


def test_a_subject_that_is_done_computes_with_what_it_publishes():
    made = groups()
    engine = engine_of(made, ema=0.5)
    engine.load(0, state(0), 0, settings())
    for group in made:
        for param in group.params.values():
            param.grad.fill_(0.3)
    engine.update(torch.tensor([True, True]))
    ema, beside = engine.state(0)["ema"]["unet.a"], made[0].params["unet.a"][1].clone()
    assert not torch.equal(made[0].params["unet.a"][0], ema[0])
    engine.put(0, engine.state(0)["ema"])
    assert torch.equal(made[0].params["unet.a"][0], ema[0])
    assert torch.equal(made[0].params["unet.a"][1], beside)
