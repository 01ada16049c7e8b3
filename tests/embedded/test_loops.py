"""The training loop: schedule, Muon, resuming."""

import numpy as np
import pytest
import torch

from dbtrain_embedded import loops


def test_pace_starts_low_peaks_and_ends_at_zero():
    assert loops.pace(0.0, 0, 100) == pytest.approx(0.01)
    assert loops.pace(0.0, 500, 100) == 1.0
    assert loops.pace(0.5, 500, 100) == pytest.approx(0.5)
    assert loops.pace(1.3, 500, 100) == pytest.approx(0.0)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=shape)).float()
    values = torch.linalg.svdvals(loops.orthogonalize(matrix))
    # Jordan's quintic leaves singular values in about [0.7, 1.2]; the square Gaussian's smallest ones lag behind.
    assert values.max() < 1.3 and values.median() > 0.65


def test_orthogonalize_lets_no_singular_value_grow_where_most_are_tiny():
    """As in a gradient of a few directions. With bf16 in the squares the largest is 9."""
    draw = np.random.default_rng(1).normal
    matrix = torch.from_numpy(draw(size=(96, 8)) @ draw(size=(8, 192)) + 1e-3 * draw(size=(96, 192)))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.linalg.svdvals(loops.orthogonalize(matrix.to(dtype)).float()).max() < 1.3


def test_trainer_resumes_where_it_stopped(tmp_path):
    def trainer(minutes):
        torch.manual_seed(0)
        return loops.Trainer("toy", torch.nn.Linear(20, 20), tmp_path, minutes, 1e-2, muon=True)

    def loss_of(model):
        inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(32, 20))).float()
        return lambda step: ((model(inputs) - inputs).square().mean(), {})

    first = trainer(0.01)
    first.run(loss_of(first.model))
    second = trainer(0.02)
    assert second.step == first.step > 0 and second.spent_s == first.spent_s
    assert torch.equal(second.model.weight, first.model.weight)
    second.run(loss_of(second.model))
    assert second.step > first.step
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8").count("finished") == 2
