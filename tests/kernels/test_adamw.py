"""AdamW over rows against torch.optim.AdamW, clipping and EMA run alone for each row, in float64."""

from functools import partial

import pytest
import torch

from dbtrain_kernels import reference
from dbtrain_kernels.adamw import adamw, adamw_op, inputs
from dbtrain_kernels.cases import Case
from tests.kit.operations import on

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS, ELEMENTS, STEPS = 3, 37, 6
LR, CLIP, DECAY, EMA = [0.03, 0.01, 0.1], [0.5, 2.0, torch.inf], [0.1, 0.0, 0.01], 0.9
CLOSE = STEPS * 1e-6
"""Each step stays within 1e-6 of float64 (BOUNDS), and errors of the steps add up."""


def cases():
    """One element, several blocks and norm chunks, rows that rest, clipping off, fp64 settings, EMA, other betas."""
    calls = {
        "plain": {},
        "one element": {"rows": 1, "elements": 1},
        "several norm chunks": {"rows": 2, "elements": 8192 + 1031},
        "a resting row": {"active_N": torch.tensor([True, False, True])},
        "no clipping": {"clip_N": torch.full((3,), torch.inf)},
        "float64 settings": {"lr_N": torch.tensor([1e-3, 1e-5, 0.0], dtype=torch.float64)},
        "late steps": {"step_N": torch.tensor([10, 1000, 100000])},
        "ema": {"ema": True},
        "a bf16 copy": {"compute": True},
        "other constants": {"beta1": 0.5, "beta2": 0.99, "eps": 1e-3},
        "no momentum": {"beta1": 0.0, "beta2": 0.0},
        "all options": {"rows": 2, "elements": 4099, "ema": True, "compute": True},
    }
    return [Case(name, partial(inputs, **call)) for name, call in calls.items()]


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


@pytest.mark.parametrize("device", DEVICES)
def test_a_bf16_copy_follows_the_masters_and_changes_none_of_their_bits(device):
    plain, copied = (on(device, inputs(compute=True)) for _ in range(2))
    del plain["compute"]
    for arguments in (plain, copied):
        for _ in range(3):
            adamw(**arguments)
    assert torch.equal(plain["master"], copied["master"])
    # To the nearest on a GPU and in PyTorch, 2^-8; Triton's interpreter cuts off, 2^-7.
    assert ((copied["compute"].float() - copied["master"]).abs() <= 2.0**-7 * copied["master"].abs()).all()
    assert (copied["compute"] != copied["master"]).any()


def test_an_update_in_parts_is_the_update_of_the_whole(monkeypatch):
    """On a CPU an arena is updated in parts that its cache holds; no bit of the result tells."""
    rows, count = 2, 4 * 90 + 3
    drawn = torch.randn((4, rows, count), generator=torch.Generator().manual_seed(5))

    def updated(cached):
        monkeypatch.setattr(reference, "CACHED", cached)
        master, ema, exp_avg, exp_avg_sq = drawn[0].clone(), drawn[0].clone(), drawn[1].clone(), drawn[2].square()
        row_N = torch.ones(rows, dtype=torch.float64)
        settings = (torch.tensor([3, 5]), row_N * 1e-2, row_N * 0.5, row_N * 0.1, torch.tensor([True, True]))
        compute = torch.zeros_like(master, dtype=torch.bfloat16)
        reference.adamw(master, drawn[3], exp_avg, exp_avg_sq, *settings, 0.9, 0.99, 1e-8, ema, 0.9, compute)
        return master, exp_avg, exp_avg_sq, ema, compute

    assert len(reference._parts(drawn[0])) == 1
    whole, parts = updated(2**20), updated(2 * 41)
    assert len(reference._parts(drawn[0])) == 9
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_a_strided_arena_is_refused_by_the_kernel():
    """It would write beside the arena's numbers."""
    arguments = inputs(rows=2, elements=4) | {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    arguments["grad"] = arguments["grad"].T.contiguous().T
    with pytest.raises(AssertionError):
        adamw_op(**arguments, ema=None, ema_decay=0.0, compute=None)
