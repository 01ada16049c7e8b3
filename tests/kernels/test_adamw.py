"""AdamW over rows against torch.optim.AdamW, clipping and EMA run alone for each row, in float64."""

import importlib.util

import pytest
import torch

from dbtrain.randomness import Purpose
from dbtrain_kernels import reference
from dbtrain_kernels.adamw import _layout_problem, adamw
from dbtrain_kernels.cases import on
from dbtrain_kernels.reference import ROUNDING, round_at_random

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS, ELEMENTS, STEPS = 3, 37, 6
LR, CLIP, DECAY, EMA = [0.03, 0.01, 0.1], [0.5, 2.0, torch.inf], [0.1, 0.0, 0.01], 0.9
CLOSE = STEPS * 1e-6
"""Each step stays within 1e-6 of float64 (cases.BOUNDS), and errors of the steps add up."""


def gradients():
    return torch.randn((STEPS, ROWS, ELEMENTS), generator=torch.Generator().manual_seed(8))


def arenas(rows=ROWS):
    """Arenas between guard rows, so that a write past a row's end shows."""
    guarded = {name: torch.full((rows + 2, ELEMENTS), 77.0) for name in ("master", "exp_avg", "exp_avg_sq", "ema")}
    start = torch.randn((rows, ELEMENTS), generator=torch.Generator().manual_seed(9))
    for name, value in guarded.items():
        value[1:-1] = start if name in ("master", "ema") else 0
    return guarded


def settings(rows=slice(None)):
    named = {"lr_N": LR, "clip_N": CLIP, "decay_N": DECAY}
    return {name: torch.tensor(values, dtype=torch.float64)[rows] for name, values in named.items()}


def ours(device, active=lambda step: [True] * ROWS, spoil=None, rows=slice(None)):
    guarded = on(device, arenas())
    views = {name: value[1:-1][rows] for name, value in guarded.items()}
    step_N = torch.zeros(len(views["master"]), dtype=torch.long, device=device)
    norms = []
    for step, grad in enumerate(gradients()):
        if spoil is not None:
            grad[spoil] = torch.nan
        active_N = torch.tensor(active(step), device=device)[rows]
        options = on(device, settings(rows)) | {"active_N": active_N, "ema_decay": EMA}
        norms.append(adamw(grad=grad[rows].to(device), step_N=step_N, **views, **options).cpu())
    assert all((value[[0, -1]] == 77).all() for value in guarded.values())
    return {name: value.cpu() for name, value in views.items()} | {"norm": torch.stack(norms), "step": step_N.cpu()}


def alone(row, steps=range(STEPS), clip_norm=None):
    """One row by torch.optim.AdamW and clip_grad_norm_ in float64."""
    param = torch.nn.Parameter(arenas()["master"][1 + row].double())
    average = param.detach().clone()
    optimizer = torch.optim.AdamW([param], lr=LR[row], weight_decay=DECAY[row])
    for step in steps:
        param.grad = gradients()[step, row].double()
        torch.nn.utils.clip_grad_norm_([param], CLIP[row] if clip_norm is None else clip_norm)
        optimizer.step()
        average = EMA * average + (1 - EMA) * param.detach()
    return {"master": param.detach(), "ema": average, **optimizer.state[param]}


def distance(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("device", DEVICES)
def test_each_row_is_torchs_adamw_alone(device):
    got = ours(device)
    for row in range(ROWS):
        want = alone(row)
        for name in ("master", "ema", "exp_avg", "exp_avg_sq"):
            assert distance(got[name][row], want[name]) < CLOSE, (row, name)
    assert torch.allclose(got["norm"].double(), gradients().double().norm(dim=2), rtol=1e-6)


def test_one_clip_for_all_rows_is_far_off():
    """Clipping bites in rows 0 and 1: with it inactive, Adam would hide the gradient's scale."""
    got = ours("cpu")["exp_avg"][0]
    assert distance(got, alone(0, clip_norm=2.0)["exp_avg"]) > 0.1


@pytest.mark.parametrize("device", DEVICES)
def test_a_resting_row_keeps_every_bit_and_its_clock(device):
    got = ours(device, active=lambda step: [True, step < 2, True])
    assert distance(got["master"][1], alone(1, range(2))["master"]) < CLOSE
    assert got["step"].tolist() == [STEPS, 2, STEPS]
    never = ours(device, active=lambda step: [True, False, True])
    assert torch.equal(never["master"][1], arenas()["master"][2]) and never["exp_avg"][1].abs().sum() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_in_its_row_and_changes_nothing_there(device):
    got, clean = ours(device, spoil=1), ours(device)
    assert torch.equal(got["master"][1], arenas()["master"][2]) and got["norm"][:, 1].isnan().all()
    for name in ("master", "exp_avg", "exp_avg_sq", "ema"):
        assert torch.equal(got[name][[0, 2]], clean[name][[0, 2]])


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_its_neighbours(device):
    whole, part = ours(device), ours(device, rows=slice(1, 2))
    assert all(torch.equal(part[name][0], whole[name][1]) for name in ("master", "exp_avg", "exp_avg_sq", "ema"))


def flat(device, grad, rounding=None, start=None, steps=1, lr=0.01):
    """(masters, bf16 weights, step) of one row after `steps` updates with the same gradient."""
    elements = len(grad)
    start = torch.linspace(-3, 3, elements) if start is None else start
    row = {name: torch.zeros(1, elements) for name in ("exp_avg", "exp_avg_sq")}
    row |= {"master": start[None].clone(), "compute": start[None].bfloat16(), "grad": grad[None]}
    named = {"lr_N": lr, "clip_N": 1.0, "decay_N": 0.0}
    row |= {name: torch.tensor([value]) for name, value in named.items()}
    row |= {"active_N": torch.tensor([True]), "step_N": torch.zeros(1, dtype=torch.long)}
    if rounding is not None:
        row["rounding_N2"] = torch.tensor([rounding])
    row = on(device, row)
    for _ in range(steps):
        adamw(**row)
    return row["master"][0].cpu(), row["compute"][0].cpu(), row["step_N"].cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_the_flat_form_is_a_row_with_a_bf16_copy(device):
    grad = torch.randn(3001, generator=torch.Generator().manual_seed(1))
    masters, weights, _ = flat(device, grad, steps=3)
    fields = {"lr_N": 0.01, "clip_N": 1.0, "decay_N": 0.0}
    row = {name: torch.zeros(1, 3001) for name in ("exp_avg", "exp_avg_sq")}
    row |= {"master": torch.linspace(-3, 3, 3001)[None].clone(), "grad": grad[None]}
    row |= {name: torch.tensor([value]) for name, value in fields.items()}
    row = on(device, row | {"active_N": torch.tensor([True]), "step_N": torch.zeros(1, dtype=torch.long)})
    for _ in range(3):
        adamw(**row)
    assert torch.equal(masters, row["master"][0].cpu())
    # To the nearest on a GPU and in PyTorch; Triton's interpreter cuts off.
    assert (weights.float() - masters).abs().max() <= 4 * 2.0**-8 and (weights != 0).any()


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_at_random_is_the_specification_bit_for_bit(device):
    grad = torch.randn(1037, generator=torch.Generator().manual_seed(1))
    masters, weights, step_N = flat(device, grad, rounding=(5, 2**32 - 1))
    want = round_at_random(masters[None], torch.tensor([(5, 2**32 - 1)]), step_N)
    assert torch.equal(weights, want[0])


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_at_random_is_unbiased_and_moves_what_the_nearest_would_not(device):
    """1 + 2^-10 lies an eighth of the way to bf16's next number, 1 + 2^-7; n draws are within 5 standard deviations."""
    count, share = 20000, 1 / 8
    value = torch.full((count,), 1 + 2.0**-10)
    nearest = flat(device, torch.zeros(count), start=value)[1]
    random = flat(device, torch.zeros(count), start=value, rounding=(1, 2))[1].float()
    assert (nearest == 1).all() and set(random.tolist()) == {1.0, 1 + 2.0**-7}
    assert abs((random > 1).float().mean().item() - share) < 5 * (share * (1 - share) / count) ** 0.5


def test_rounding_keeps_infinities_and_nan():
    value = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0]])
    got = round_at_random(value, torch.tensor([[1, 2]]), torch.tensor([1]))[0]
    assert got[0] == torch.inf and got[1] == -torch.inf and got[2].isnan() and got[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_in_parts_is_the_update_of_the_whole(dtype, monkeypatch):
    """On a CPU an arena is updated in parts that its cache holds; no bit of the result tells."""
    rows, count = 2, 4 * 90 + 3
    drawn = torch.randn((4, rows, count), generator=torch.Generator().manual_seed(5))

    def updated(cached):
        monkeypatch.setattr(reference, "CACHED", cached)
        master, ema = drawn[0].to(dtype, copy=True), drawn[0].clone()
        exp_avg, exp_avg_sq = drawn[1].clone(), drawn[2].square()
        row_N = torch.ones(rows, dtype=torch.float64)
        settings = (torch.tensor([3, 5]), row_N * 1e-2, row_N * 0.5, row_N * 0.1, torch.tensor([True, True]))
        keys = torch.tensor([[1, 2], [3, 4]]) if dtype == torch.bfloat16 else None
        compute = torch.zeros_like(master, dtype=torch.bfloat16)
        reference.adamw(master, drawn[3], exp_avg, exp_avg_sq, *settings, 0.9, 0.99, 1e-8, ema, 0.9, compute, keys)
        return master, exp_avg, exp_avg_sq, ema, compute

    assert len(reference._parts(drawn[0])) == 1
    whole, parts = updated(2**20), updated(2 * 40)
    assert len(reference._parts(drawn[0])) == 10
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_the_stream_of_rounding_has_its_own_purpose():
    assert ROUNDING == Purpose.ROUNDING


WRONG = {
    "counts to": lambda: torch.empty(1, 2**31, device="meta"),
    "second side": lambda: torch.empty(2**16, 1, device="meta"),
    "not contiguous": lambda: torch.empty(4, 4).T,
}


@pytest.mark.parametrize("said", WRONG)
def test_what_the_kernel_cannot_take_is_named(said):
    assert said in _layout_problem(master=WRONG[said]())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_largest_arenas_fit_a_grid():
    """CUDA refuses a second side above 65,535, which neither the interpreter nor the compiler tells."""
    from dbtrain_kernels.adamw_triton import BLOCK, NORM_BLOCK, grid

    for rows, elements in ((1, 2**31 - 1), (2**16 - 1, 1024), (8, 93_000_000)):
        for block in (BLOCK, NORM_BLOCK):
            first, second = grid(rows, elements, block)
            assert first < 2**31 and second < 2**16 and first * block >= elements and second == rows
