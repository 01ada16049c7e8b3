"""A pack against each of its subjects alone, by oracles that share nothing with its arenas; and its mutants caught."""

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, vmap

import dbtrain.engines.packed as packed_module
from dbtrain.engines.packed import PackedEngine
from dbtrain.results.checkpoint import Checkpoint
from dbtrain.training.step import TrainingStep
from dbtrain.values import StepLoss
from tests.kit.small_pack import (
    BATCH,
    Case,
    FixedBank,
    distance,
    equal,
    make_pack,
    start,
    train_alone,
    train_pack,
)

CASES = [
    Case("rex", 1, 1e-2, 12, 2, 0.5, 0.58),
    Case("tom", 2, 3e-3, 7, 4, 0.25, 0.73),
    Case("ben", 3, 2e-2, 9, 1, 2.0, 1.24, "linear", 3),
    Case("ada", 4, 5e-3, 10, 3, 1.0, 0.95, "constant"),
    Case("ivy", 5, 1e-2, 6, 4, 0.5, 1.0),
]
"""Five subjects that share no setting, for three rows: two come in when others end. Clips lie among the norms: one far
below them would hide a wrong scale of the gradient, one above would hide whose norm it is."""
EXACT = 1e-12
"""float64: twelve steps of a few hundred roundings of 2^-53 each, and AdamW's quotients."""
SINGLE = 2e-5
"""float32: the same count of roundings of 2^-24, and products summed in another order."""


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=str)
def test_every_subject_is_as_if_alone(dtype, tolerance):
    """Weights, moments and EMA; different seed, rate, schedule, length, rank, lambda and clip, and clipping bites."""
    states, norms, _ = train_pack(CASES, dtype, size=3)
    for case in CASES:
        assert len(norms[case.name]) == case.steps
        assert case.steps / 2 < sum(norm > case.clip for norm in norms[case.name]) < case.steps
        assert distance(states[case.name], train_alone(case, dtype)) < tolerance, case.name
        moved = {"master": states[case.name]["master"]}, {"master": train_alone(case, dtype, 1)["master"]}
        assert distance(*moved) > 1e-2


def test_up_matrices_may_learn_faster_in_a_pack_as_alone():
    """LoRA+: two arenas, clipped by their joint norm; alone, two groups of one optimizer."""
    cases = [replace(case, up_ratio=4.0) for case in CASES[:3]]
    states, _, _ = train_pack(cases, torch.float64, size=2)
    plain, _, _ = train_pack(CASES[:1], torch.float64)
    for case in cases:
        assert distance(states[case.name], train_alone(case, torch.float64)) < EXACT, case.name
    first = cases[0].name
    assert distance({"master": states[first]["master"]}, {"master": plain[first]["master"]}) > 1e-2


def test_neighbours_slot_and_order_change_no_bit():
    first, _, _ = train_pack(CASES, torch.float32, size=3)
    others = [replace(case, name=f"x{case.name}", lr=3 * case.lr) for case in CASES]
    for order in (CASES[::-1], [*others[:2], *CASES, *others[2:]], [CASES[2]]):
        again, _, _ = train_pack(order, torch.float32, size=3, rank=4)
        for case in CASES:
            assert case.name not in again or equal(again[case.name], first[case.name]), case.name


@pytest.mark.gpu
def test_on_a_gpu_too(monkeypatch):
    """The kernels' step against solo training on the CPU, and among other neighbours to the bit."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    first, norms, _ = train_pack(CASES, torch.float32, size=3, device="cuda")
    again, _, _ = train_pack(CASES[::-1], torch.float32, size=3, device="cuda")
    for case in CASES:
        assert distance(first[case.name], train_alone(case, torch.float32)) < SINGLE, case.name
        assert equal(again[case.name], first[case.name]), case.name
        assert case.steps / 2 < sum(norm > case.clip for norm in norms[case.name])


def test_padding_of_smaller_ranks_stays_exactly_zero():
    pack = train_pack(CASES[:3], torch.float32)[2]
    arena = pack.engine.arenas[0]
    for row, case in enumerate(CASES[:3]):
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
            for name in arena.params:
                view = arena.view(arena[kind], name)[row]
                rest = view[case.rank :] if name.endswith("down_NRD") else view[:, case.rank :]
                assert (rest == 0).all(), (case.name, kind, name)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_random_packs(data):
    size = data.draw(st.integers(1, 3))
    cases = [
        Case(
            f"s{number}",
            data.draw(st.integers(0, 2**40)),
            data.draw(st.floats(1e-4, 3e-2)),
            data.draw(st.integers(1, 5)),
            data.draw(st.integers(1, 3)),
            data.draw(st.sampled_from([0.25, 1.0, 4.0])),
            data.draw(st.sampled_from([None, 0.002, 0.02])),
            data.draw(st.sampled_from(["constant", "linear", "cosine"])),
        )
        for number in range(data.draw(st.integers(1, 4)))
    ]
    states, norms, _ = train_pack(cases, size=size)
    for case in cases:
        assert distance(states[case.name], train_alone(case)) < EXACT
        # Below every norm that was met, so that one clip for all, or a mean for a sum, cannot hide.
        assert case.clip is None or min(norms[case.name]) > case.clip


def test_gradients_are_those_of_vmap():
    """An oracle for the stack itself: one subject's loss, batched by torch.func over the subjects' own matrices."""
    cases, dtype = CASES[:3], torch.float64
    cases = [replace(case, rank=2) for case in cases]
    pack = make_pack(dtype, 3, 2, 12)
    for row, case in enumerate(cases):
        pack.seat(row, start(pack, case, dtype))
    arena = pack.engine.arenas[0]
    with torch.no_grad():
        arena["master"].normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    batch = pack.batch([(row, FixedBank(case, dtype), 0) for row, case in enumerate(cases)])
    pack.module(batch, pack.engine.step_N).loss.backward()
    module, alone = pack.module, make_pack(dtype, 1, 2, 12)
    names = {f"denoiser.{name.removeprefix('unet.')}": name for name in arena.params}
    rows = {ours: arena.view(arena["master"], name)[:, None] for ours, name in names.items()}
    with torch.no_grad():
        clean, noise, x_t, index_B = module.noised(batch, pack.engine.step_N)
        weight_B = module.weights(batch, index_B).to(dtype)
        alpha, sigma = (
            table[index_B].view(-1, 1, 1, 1) for table in (module.schedule.alpha_S, module.schedule.sigma_S)
        )
        target = alpha * noise - sigma * clean
        told = module.conditioning(batch).states_BTD

    def loss(matrices, scale, x_t, time, told, target, weight):
        scales = {name: scale[None] for name, _ in alone.module.denoiser.named_buffers()}
        matrices = {name.removeprefix("denoiser."): value for name, value in matrices.items()} | scales
        prediction = functional_call(alone.module.denoiser, matrices, (x_t, time, told))
        return ((prediction - target).square().flatten(1).mean(1) * weight).sum()

    split = lambda tensor: tensor.view(3, 2 * BATCH, *tensor.shape[1:])  # noqa: E731
    scale_N = torch.full((3,), 1.5, dtype=dtype)
    got = vmap(grad(loss))(rows, scale_N, *map(split, (x_t, index_B, told, target, weight_B)))
    for ours, name in names.items():
        want, mine = got[ours][:, 0], arena.view(arena.grad, name)
        assert want.norm() > 0 and ((want - mine).norm() / want.norm()).item() < EXACT, name


class MaskedBank(FixedBank):
    """The same samples with masks on the photos."""

    def draw(self, step, slots):
        mask = torch.rand(BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        batch = super().draw(step, slots)
        return replace(batch, mask_B1HW=torch.cat([mask.to(self.dtype), torch.ones_like(mask)]))


def row_gradients(banks, masked):
    """Gradients [N, P] of a pack of subjects at their first step."""
    pack = make_pack(torch.float64, len(banks), 2, 12, masked=masked)
    for row, bank in enumerate(banks):
        pack.seat(row, start(pack, bank.case, torch.float64))
    pack.module(pack.batch([(row, bank, 0) for row, bank in enumerate(banks)]), pack.engine.step_N).loss.backward()
    return pack.engine.arenas[0].grad.clone()


def test_a_masked_subject_in_a_pack_has_the_gradient_it_has_alone_and_changes_no_neighbour():
    first, second = (replace(case, rank=2) for case in CASES[:2])
    plain = [FixedBank(first, torch.float64), FixedBank(second, torch.float64)]
    masked = MaskedBank(second, torch.float64)
    together, without = row_gradients([plain[0], masked], True), row_gradients(plain, False)
    alone = row_gradients([masked], True)
    assert torch.equal(together[0], without[0]) and without[0].norm() > 0
    assert ((together[1] - alone[0]).norm() / alone[0].norm()).item() < EXACT
    assert ((together[1] - without[1]).norm() / without[1].norm()).item() > 0.1
    assert torch.equal(row_gradients(plain, True), without), "factors of 1 change no bit"


def test_every_batch_of_a_masked_pack_has_factors():
    """A recorded step cannot change what it reads."""
    pack = make_pack(torch.float32, 2, 2, 3, masked=True)
    seats = [(0, FixedBank(CASES[0], torch.float32), 0)]
    shapes = [batch.mask_B1HW.shape for batch in (pack.rehearsal((8, 4, 4)), pack.batch(seats))]
    assert shapes == [(4 * BATCH, 1, 4, 4)] * 2
    assert pack.batch([(1, MaskedBank(CASES[0], torch.float32), 0)]).mask_B1HW[: 2 * BATCH].eq(1).all()
    assert make_pack(torch.float32, 2, 2, 3).batch(seats).mask_B1HW is None


def test_what_was_drawn_ahead_is_used_for_its_own_bank_and_step_alone():
    pack, bank, other = make_pack(torch.float64, 1, 2, 12), *(FixedBank(case, torch.float64) for case in CASES[:2])
    pack.seat(0, start(pack, CASES[0], torch.float64))
    pack.draw_ahead([(0, bank, 5)])
    drawn = pack.drawn[0][2]
    for asked, used in ((bank, 5), True), ((other, 5), False), ((bank, 6), False):
        pack.drawn = {0: (bank, 5, drawn)}
        pack.batch([(0, *asked)])
        assert (pack.parts[0] is drawn) == used and not pack.drawn


def test_nothing_of_a_pack_is_left_when_it_is_dropped():
    """Probes of larger and larger packs, and a graph's memory, must not wait for the garbage collector."""
    pack = make_pack(torch.float32, 2, 2, 3)
    pack.step(pack.batch([(0, FixedBank(CASES[0], torch.float32), 0)]))
    pack, seen = None, weakref.ref(pack)
    assert seen() is None


def test_backward_adds_into_the_arena():
    """The parameters' gradients are the arena's views and stay so; a copy would leave the arena at zero."""
    pack = make_pack(torch.float32, 2, 2, 12)
    pack.seat(0, start(pack, replace(CASES[0], rank=2), torch.float32))
    arena = pack.engine.arenas[0]
    before = {name: param.grad.data_ptr() for name, param in arena.params.items()}
    batch = pack.batch([(0, FixedBank(CASES[0], torch.float32), 0)])
    for _ in range(2):
        pack.module(batch, pack.engine.step_N).loss.backward()
    assert arena.grad.abs().sum() > 0
    assert {name: param.grad.data_ptr() for name, param in arena.params.items()} == before


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=str)
def test_a_nan_stays_with_its_subject_at_its_last_good_state(dtype, tolerance):
    good, _, _ = train_pack(CASES[:3], dtype)
    bad, _, pack = train_pack(CASES[:3], dtype, poison=("rex", 4))
    assert equal(bad["tom"], good["tom"]) and equal(bad["ben"], good["ben"])
    assert distance(bad["rex"], train_alone(CASES[0], dtype, steps=4)) < tolerance
    assert pack.engine.step_N.tolist() == [4, 7, 9]


def test_a_row_goes_on_from_its_checkpoint_bit_by_bit():
    """Out at step 4 with its state and counters, in again in another row beside others: the undisturbed result."""
    whole, _, _ = train_pack(CASES[:3], torch.float32)
    pack = make_pack(torch.float32, 3, 4, 12)
    bank = FixedBank(CASES[0], torch.float32)
    pack.seat(1, start(pack, CASES[0], torch.float32))
    for step in range(4):
        pack.advance(pack.batch([(1, bank, step)]))
    kept = Checkpoint(4, "", pack.engine.state(1), pack.observe()[1].average)
    pack = make_pack(torch.float32, 3, 4, 12)
    pack.seat(2, start(pack, CASES[0], torch.float32, kept))
    for step in range(4, 12):
        pack.advance(pack.batch([(2, bank, step)]))
    assert equal(pack.engine.state(2), whole["rex"])


def test_an_early_stop_ends_at_its_step_and_holds_the_row(monkeypatch):
    """The step is the first, from the window on, at which the photos' error averaged over it is below the threshold."""
    monkeypatch.setattr("dbtrain.packing.pack.WINDOW", 4)
    case = replace(CASES[0], steps=12)
    pack = make_pack(torch.float64, 2, 2, 12)
    pack.seat(0, start(pack, case, torch.float64))
    bank, errors, average, averages = FixedBank(case, torch.float64), [], 0.0, []
    for step in range(12):
        pack.advance(pack.batch([(0, bank, step)]))
        seen = pack.observe()[0]
        pack.forget([0])
        errors.append(seen.values["loss_instance"])
        average += (errors[-1] - average) / min(step + 1, 4)
        averages.append(average)
        assert seen.average == pytest.approx(average, rel=1e-12)
    assert averages[3] == pytest.approx(sum(errors[:4]) / 4)
    bound = sorted(averages[3:])[4]
    first = next(step for step in range(3, 12) if averages[step] < bound)
    config = case.config.model_copy(update={"train": case.config.train.model_copy(update={"stop_loss": bound})})
    pack = make_pack(torch.float64, 2, 2, 12, config)
    pack.seat(1, start(pack, case, torch.float64))
    for step in range(12):
        pack.advance(pack.batch([(1, bank, step)]))
    assert pack.engine.step_N[1] == first + 1 and not pack.observe()[1].live
    assert distance(pack.engine.state(1), train_alone(case, steps=first + 1)) < EXACT


def mean_over_the_pack(patch):
    forward = TrainingStep.forward

    def averaged(self, batch, step):
        loss = forward(self, batch, step)
        share = loss.loss / 3 if batch.subject_B is not None else loss.loss
        return StepLoss(share, loss.per_sample_B, loss.weight_B)

    patch.setattr(TrainingStep, "forward", averaged)


def one_global_clip(patch):
    def clips(self, grads):
        norm_N = torch.linalg.vector_norm(grads[0], dim=1)
        share = (self.clip_N / (norm_N.norm() + 1e-6)).clamp(max=1.0)
        return [share * (norm_N + 1e-6)], None

    patch.setattr(PackedEngine, "_clips", clips)


def shared_bias_correction(patch):
    adamw = packed_module.adamw

    def shared(master, grad_NP, exp_avg, exp_avg_sq, step_N, *rest):
        return adamw(master, grad_NP, exp_avg, exp_avg_sq, step_N.max().expand_as(step_N).clone(), *rest)

    patch.setattr(packed_module, "adamw", shared)


def shared_step_count(patch):
    rates = PackedEngine.rates_GN.fget

    def shared(self):
        own, self.step_N = self.step_N, self.step_N.max().expand_as(self.step_N)
        found, self.step_N = rates(self), own
        return found

    patch.setattr(PackedEngine, "rates_GN", property(shared))


def the_neighbours_noise(patch):
    noised = TrainingStep.noised

    def rolled(self, batch, step):
        own, self.key_N2 = self.key_N2, self.key_N2.roll(1, 0)
        drawn, self.key_N2 = noised(self, batch, step), own
        return drawn

    patch.setattr(TrainingStep, "noised", rolled)


def one_lambda(patch):
    weights = TrainingStep.weights

    def shared(self, batch, index_B):
        if batch.subject_B is not None:
            batch = replace(batch, subject_B=torch.zeros_like(batch.subject_B))
        return weights(self, batch, index_B)

    patch.setattr(TrainingStep, "weights", shared)


@pytest.mark.parametrize(
    "mutant, seen",
    [
        (mean_over_the_pack, 1e-3),
        (one_global_clip, 1e-3),
        (shared_bias_correction, 1e-3),
        (shared_step_count, 1e-3),
        (the_neighbours_noise, 1e-2),
        (one_lambda, 1e-3),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_mutants_are_caught(monkeypatch, mutant, seen):
    """Each is far outside the tolerance of the tests above; the packs are mutated, not the subjects alone."""
    alone = {case.name: train_alone(case) for case in CASES}
    mutant(monkeypatch)
    states, _, _ = train_pack(CASES, size=3)
    assert max(distance(states[case.name], alone[case.name]) for case in CASES) > seen


def masked_by_a_factor(
    master, grad, exp_avg, exp_avg_sq, step_N, lr_N, clip_N, decay_N, active_N, beta1, beta2, eps, ema, ema_decay, _
):
    """AdamW whose resting rows are held by a factor of 0 instead of `where`."""
    norm_N = grad.norm(dim=1)
    step_N += active_N
    clipped = grad * (clip_N / (norm_N + 1e-6)).clamp(max=1).to(grad.dtype)[:, None]
    mean = exp_avg + (clipped - exp_avg) * (1 - beta1)
    square = exp_avg_sq * beta2 + clipped * clipped * (1 - beta2)
    count, lr, decay = (value.to(grad.dtype)[:, None] for value in (step_N.clamp(min=1), lr_N, decay_N))
    change = mean / (1 - beta1**count) / ((square / (1 - beta2**count)).sqrt() + eps)
    value = master * (1 - lr * decay) - lr * change
    changed = ((exp_avg, mean), (exp_avg_sq, square), (master, value), (ema, ema + (value - ema) * (1 - ema_decay)))
    for arena, new in changed:
        arena += (new - arena) * active_N[:, None]
    return norm_N


def test_a_nan_times_zero_is_caught(monkeypatch):
    """Right for every row whose numbers are finite, the mutant turns the bad subject's last good state into NaN."""
    good = {case.name: train_alone(case) for case in CASES[:3]}
    monkeypatch.setattr(packed_module, "adamw", masked_by_a_factor)
    sound, _, _ = train_pack(CASES[:3])
    bad, _, _ = train_pack(CASES[:3], poison=("rex", 4))
    assert all(distance(sound[name], good[name]) < SINGLE for name in good)
    assert all(distance(bad[name], good[name]) < SINGLE for name in ("tom", "ben"))
    assert all(value.isnan().any() for value in bad["rex"]["master"].values())
