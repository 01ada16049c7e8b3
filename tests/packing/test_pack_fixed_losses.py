"""What `train.stop` watches in a pack: each row's error at fixed noise, as of the subject alone."""

import pytest
import torch

from dbtrain.randomness import stream_key
from dbtrain.training.held_out import FIXED
from dbtrain.training.step import TrainingStep
from dbtrain.training.trainables import make_trainable
from tests.kit.small_pack import (
    BATCH,
    FAMILY,
    Case,
    FixedBank,
    adapters_of,
    captions,
    equal,
    make_pack,
    models_of,
    start,
)

CASE = Case("rex", 1, steps=12, clip=0.58)
BESIDE = (Case("tom", 2, 3e-3, 7), Case("ben", 3, 2e-2, 9))
EXACT = 1e-12
"""float64: as in test_pack.py."""


def test_a_loss_at_fixed_noise_is_that_of_the_subject_alone_and_changes_nothing(monkeypatch):
    """To the last bit the same, whatever trains beside it: `train.stop` ends a training by it."""
    monkeypatch.setattr("dbtrain.packing.pack.fixed_samples", lambda bank, slots: bank.draw(0, slots))
    seen, case = [], CASE
    for beside in BESIDE:
        pack, own = make_pack(torch.float64, 2, 2, 12), [case, beside]
        banks = {row: FixedBank(one, torch.float64) for row, one in enumerate(own)}
        for row, one in enumerate(own):
            pack.seat(row, start(pack, one, torch.float64))
        for step in range(3):
            pack.advance(pack.batch([(row, bank, step) for row, bank in banks.items()]))
        before = pack.engine.state(0)
        seen += [pack.fixed_losses(banks)[0], pack.fixed_losses({0: banks[0]})[0]]
        assert equal(pack.engine.state(0), before) and pack.engine.step_N.tolist() == [3, 3]
    assert len(set(seen)) == 1
    models = models_of(torch.float64)
    with adapters_of(torch.float64):
        (group,) = make_trainable(FAMILY, models, case.config, case.name)
    for name, param in group.params.items():
        param.data.copy_(before["master"][name])
    alone = TrainingStep(FAMILY, models, case.config, stream_key(case.seed, case.name), captions(case, torch.float64))
    errors_B = alone(banks[0].draw(0, range(BATCH)), FIXED).per_sample_B
    assert seen[0] == pytest.approx(errors_B.mean().item(), rel=EXACT)
    assert seen[0] != pytest.approx(alone(banks[0].draw(0, range(BATCH)), 0).per_sample_B.mean().item(), rel=1e-3)
