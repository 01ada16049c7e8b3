"""Counting sees what a GPU would launch, cast and wait for; a pack's step waits for nothing."""

import pytest
import torch
import torch.nn.functional as F

from dbtrain.bench import operators
from dbtrain.bench.operators import Operators
from dbtrain_kernels import OPS, of_operators
from tests.kit.main_job import make_bank, small_config
from tests.kit.small_pack import Case, FixedBank, make_pack, start


def counted(function):
    with Operators() as seen:
        function()
    return seen


def test_views_and_fresh_memory_launch_nothing():
    x = torch.ones(4, 6)
    assert counted(lambda: (x.view(6, 4).T[1:].unsqueeze(0).expand(2, 3, 6), torch.empty(3), x.detach())).launches == 0


def test_backward_counts():
    x, w = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    seen = counted(lambda: F.linear(x, w).sum().backward())
    # Forward: mm and sum. Backward: ones, the sum's expand made whole for mm, and mm.
    assert seen.names["mm"] == 2 and seen.launches <= 6


def test_casts_are_told_from_copies():
    x = torch.ones(3)
    seen = counted(lambda: (x.bfloat16(), x.clone(), x.to(torch.float32)))
    assert (seen.casts, seen.launches) == (1, 2)


@pytest.mark.parametrize(
    "name, wait",
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool(x.any())),
        ("nonzero", lambda x: x.nonzero()),
        ("index", lambda x: x[x > 0]),
        ("masked_select", lambda x: x.masked_select(x > 0)),
    ],
)
def test_waits_are_seen(name, wait):
    assert name in counted(lambda: wait(torch.ones(3))).waits


@pytest.mark.parametrize(
    "name, arguments, named, waits",
    [
        ("_to_copy", ("meta",), {"device": "cpu"}, True),
        ("_to_copy", ("meta",), {"device": "cpu", "non_blocking": True}, True),
        ("_to_copy", ("cpu",), {"device": "cpu"}, False),
        ("_to_copy", ("cpu",), {"device": "meta"}, True),
        ("_to_copy", ("cpu",), {"device": "meta", "non_blocking": True}, False),
        ("_to_copy", ("meta",), {"dtype": torch.float32}, False),
        ("copy_", ("cpu", "meta"), {}, True),
        ("copy_", ("meta", "cpu"), {}, True),
        ("copy_", ("meta", "meta"), {}, False),
    ],
)
def test_a_copy_to_or_from_the_host_is_a_wait(name, arguments, named, waits):
    """The meta device stands for a GPU, since nothing can be copied off it."""
    tensors = [torch.ones(3, device=device) for device in arguments]
    assert operators._crosses(name, tensors, named) == waits


def test_drawing_a_packs_batch_waits_for_nothing():
    """The next step's samples are picked while the last step runs. The meta device stands for a GPU; numbers that the
    host reads are its own."""
    made = make_bank(small_config("data.flip=true"))
    for role in made.items:
        made.moments[role, made.shapes[0]] = torch.zeros(3, 2, 8, 4, 4, device="meta")
    seen = counted(lambda: made.batch(3, range(2), "meta"))
    assert seen.names["index"] >= 2 and seen.names["_to_copy"] > 4
    assert set(seen.waits) <= {"_local_scalar_dense"}


def test_a_packs_step_waits_for_nothing(monkeypatch):
    """`tolist` and `numpy` read a CPU tensor without an operator, so they are watched by name."""
    pack, cases = make_pack(torch.float32, 2, 2, 8), [Case("a"), Case("b", prior=0.25)]
    for row, case in enumerate(cases):
        pack.seat(row, start(pack, case, torch.float32))
    batch = pack.batch([(row, FixedBank(case, torch.float32), 0) for row, case in enumerate(cases)])
    read = []
    for name in ("tolist", "numpy", "__array__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, method=method, **k: read.append(method) or method(*a, **k))
    seen = counted(lambda: pack.advance(batch))
    assert seen.launches > 50 and not seen.waits and not read
    pack.observe()
    assert read  # the one place that does


def test_every_operation_has_its_launches():
    assert set(OPS) <= set(of_operators("launches"))


@pytest.mark.gpu
def test_on_a_gpu_a_packs_step_waits_for_nothing():
    """CUDA itself says so: any wait inside the step is an error."""
    from dbtrain.bench.pack import load, packed
    from dbtrain.settings import recipes

    config = recipes.load("tiny", ["engine.kind=packed", "engine.capture=off", "train.precision=bf16"])
    with packed(load(config, False), config, 2) as rig:  # warm: compiled and allocated
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            rig.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
