"""fp16: losses near fp32's, and an overflow that leaves out one row's step and touches no other row."""

import math

import pytest
import torch

from dbtrain.engines import loss_scale
from dbtrain.engines.loss_scale import GROWTH, LEAST, MOST, START, LossScales, resolved_precision
from dbtrain.settings.config import RunConfig
from tests.kit.small_pack import BATCH, Case, FixedBank, make_pack, start

ROUND = 2.0**-11
"""fp16 rounds each number by at most this share of it."""
CHAIN = 12
"""Products and sums between the latents and the prediction of `small_pack.Denoiser`, each of which rounds."""


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def test_each_row_follows_its_own_overflows_and_a_grown_scale_doubles():
    scales = LossScales(3)
    for _ in range(GROWTH):
        assert not scales.update(flags(1, 1, 1), flags(1, 1, 0)).any()
    assert scales.scale_N.tolist() == [2 * START, 2 * START, START] and scales.good_N.tolist() == [0, 0, 0]
    assert scales.update(flags(0, 1, 0), flags(1, 1, 0)).tolist() == [True, False, False]
    assert scales.scale_N.tolist() == [START, 2 * START, START] and scales.skipped_N.tolist() == [1, 0, 0]
    assert scales.good_N.tolist() == [0, 1, 0]


def test_a_gradient_that_is_not_finite_at_the_least_scale_is_no_overflow():
    scales = LossScales(1)
    for _ in range(int(math.log2(START / LEAST))):
        assert scales.update(flags(0), flags(1)).item()
    assert scales.scale_N.item() == LEAST and not scales.update(flags(0), flags(1)).item()


def test_a_scale_stays_below_its_limit_and_comes_back_from_a_checkpoint():
    scales, other = LossScales(2), LossScales(1)
    scales.scale_N[1] = MOST
    for _ in range(GROWTH):
        scales.update(flags(1, 1), flags(1, 1))
    scales.update(flags(1, 0), flags(1, 1))
    other.load(0, scales.state(1))
    assert (other.scale_N.item(), other.good_N.item(), other.skipped_N.item()) == (MOST / 2, 0, 1)
    other.load(0, None)
    assert (other.scale_N.item(), other.skipped_N.item()) == (START, 0)


@pytest.mark.parametrize("device, bf16, wanted", [
    ("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16"),
])  # fmt: skip
def test_auto_is_what_the_device_has(monkeypatch, device, bf16, wanted):
    monkeypatch.setattr(loss_scale.torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    asked = RunConfig.model_validate({"train": {"precision": "auto"}})
    assert resolved_precision(asked, device).train.precision == wanted
    named = RunConfig.model_validate({"train": {"precision": "fp16"}})
    assert resolved_precision(named, device) is named


def half_pack(cases, precision="fp16"):
    """A pack of these cases with the denoiser in a precision, every subject in its row."""
    config = cases[0].config
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    pack = make_pack(torch.float32, len(cases), 2, 8, config)
    if precision == "fp16":
        pack.models.denoiser.half()
        for arena in pack.engine.arenas:  # `half` has made new tensors of the views
            for name, param in arena.params.items():
                param.data, param.grad = arena.view(arena.compute, name), arena.view(arena.grad, name)
    for row, case in enumerate(cases):
        pack.seat(row, start(pack, case, torch.float32))
    return pack


def step(pack, cases, number):
    """The mean loss of each row's step."""
    pack.forget(range(len(cases)))
    pack.advance(pack.batch([(row, FixedBank(case, torch.float32), number) for row, case in enumerate(cases)]))
    return [seen.values["loss"] for seen in pack.observe()]


CASES = [Case("ann", lr=1e-3), Case("bob", lr=1e-3, seed=3), Case("cyn", lr=1e-3, prior=0.25)]


def test_losses_of_a_pack_in_fp16_are_within_the_roundings_of_fp32s():
    """d loss / loss <= 2 |d f| / |f - y| to first order, and |d f| <= CHAIN * ROUND * |f|, with |f| at most about
    |f - y| here; steps of 1e-3 carry a difference on by less than a rounding each."""
    plain, half = half_pack(CASES, "fp32"), half_pack(CASES)
    assert half.engine.arenas[0].compute.dtype == torch.float16 and half.module.half == torch.float16
    for number in range(6):
        wanted, got = step(plain, CASES, number), step(half, CASES, number)
        assert got == pytest.approx(wanted, rel=2 * CHAIN * ROUND), number
        assert got != wanted
        norms = [[seen.values["grad_norm"] for seen in pack.observe()] for pack in (plain, half)]
        assert norms[1] == pytest.approx(norms[0], rel=0.05), "the scale is taken out before norm and clip"
    assert half.engine.scales.skipped_N.tolist() == [0, 0, 0]
    ours, theirs = (pack.engine.state(1)["master"] for pack in (half, plain))
    moved = max(float((theirs[name] - start(plain, CASES[1], torch.float32).checkpoint.state["master"][name])
                      .abs().max()) for name in theirs)  # fmt: skip
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    assert apart < moved / 4, "the updates are those of fp32, and not rounded away"


def test_an_overflow_of_one_row_leaves_out_its_step_alone():
    calm, hit = half_pack(CASES), half_pack(CASES)
    for pack in (calm, hit):
        step(pack, CASES, 0)
    hit.engine.scales.scale_N[1] = 2.0**30
    before, loss = hit.engine.state(1), step(hit, CASES, 1)
    assert loss == step(calm, CASES, 1), "the scale is in no measured value"
    after = hit.engine.state(1)
    assert all(torch.equal(before[kind][name], after[kind][name]) for kind in ("master", "exp_avg", "exp_avg_sq", "ema")
               for name in before[kind])  # fmt: skip
    assert hit.engine.scales.skipped_N.tolist() == [0, 1, 0] and hit.engine.failed_N.tolist() == [False] * 3
    for number in range(2, 8):
        hit.engine.scales.scale_N[1] = START
        for pack in (calm, hit):
            step(pack, CASES, number)
    for row in (0, 2):
        ours, theirs = hit.engine.state(row), calm.engine.state(row)
        assert all(torch.equal(ours[kind][name], theirs[kind][name]) for kind in theirs for name in theirs[kind])
    assert hit.engine.step_N.tolist() == [8, 8, 8] and not hit.engine.live_N.any()
    assert not torch.equal(*(next(iter(pack.engine.state(1)["master"].values())) for pack in (hit, calm)))


def test_a_loss_that_is_not_finite_fails_its_row_and_no_scale_hides_it():
    pack = half_pack(CASES)
    batch = pack.batch([(row, FixedBank(case, torch.float32), 0) for row, case in enumerate(CASES)])
    batch.images_BCHW[2 * BATCH] = math.nan
    pack.advance(batch)
    assert pack.engine.failed_N.tolist() == [False, True, False] and pack.engine.scales.skipped_N.tolist() == [0, 0, 0]


def test_a_row_goes_on_from_its_checkpoint_with_its_scale():
    whole, first = half_pack(CASES), half_pack(CASES)
    for pack in (whole, first):
        step(pack, CASES, 0)
        pack.engine.scales.scale_N[1] = 2.0**30
        step(pack, CASES, 1)
        pack.engine.scales.scale_N[1] = 64.0
        step(pack, CASES, 2)
    from dbtrain.results.checkpoint import Checkpoint

    second = half_pack(CASES)
    for row, case in enumerate(CASES):
        second.seat(row, start(second, case, torch.float32, Checkpoint(3, "", first.engine.state(row))))
    for pack in (whole, second):
        for number in range(3, 8):
            step(pack, CASES, number)
    for row in range(3):
        ours, theirs = second.engine.state(row), whole.engine.state(row)
        assert all(torch.equal(ours[kind][name], theirs[kind][name]) for kind in theirs for name in theirs[kind])


def test_adamws_count_moves_with_updates_alone():
    """The first update of AdamW moves a weight by its rate, m / sqrt(v) being 1; counted as the second it would be 0.74
    of that."""
    cases = [Case("ann", lr=1e-3, clip=None, schedule="constant")]
    pack = half_pack(cases)
    pack.engine.scales.scale_N[0] = 2.0**30
    step(pack, cases, 0)
    assert pack.engine.scales.skipped_N.tolist() == [1]
    pack.engine.scales.scale_N[0] = START
    before = pack.engine.state()["master"]
    step(pack, cases, 1)
    after = pack.engine.state()["master"]
    assert max(float((after[name] - before[name]).abs().max()) for name in after) == pytest.approx(1e-3, rel=0.05)
