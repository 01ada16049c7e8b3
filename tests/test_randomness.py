"""Random numbers by name: the same whatever the batch, apart for every purpose, step, slot and subject."""

import itertools
import math
from decimal import Decimal, getcontext

import pytest
import torch

from dbtrain.randomness import Purpose, permutation, stream_key, uniform_range, uniforms
from dbtrain_kernels.philox import normal, philox
from tests.kit.normals import normals

KEY = stream_key(0, "rex")


def test_a_draw_does_not_depend_on_its_batch():
    together = normals(KEY, Purpose.NOISE, 3, torch.tensor([0, 1, 2, 3, 9]), (4, 3, 5))
    for row, slot in enumerate([0, 1, 2, 3, 9]):
        assert torch.equal(normals(KEY, Purpose.NOISE, 3, torch.tensor([slot]), (4, 3, 5))[0], together[row])
    shuffled = normals(KEY, Purpose.NOISE, 3, torch.tensor([9, 2, 0, 3, 1]), (4, 3, 5))
    assert torch.equal(shuffled, together[[4, 2, 0, 3, 1]])


def test_uniforms_do_not_depend_on_their_batch():
    together = uniforms(KEY, Purpose.TIMESTEP, 8, torch.arange(6))
    alone = torch.cat([uniforms(KEY, Purpose.TIMESTEP, 8, torch.tensor([slot])) for slot in range(6)])
    assert torch.equal(together, alone)
    assert together.dtype == torch.float64 and len(set(together.tolist())) == 6


def test_normals_are_box_muller_of_the_named_words():
    """Against math.log/sin/cos in float64, element by element; the last rounding is to float32, so equality is exact
    but for ties: one unit in the last place is allowed."""
    step, slots, shape = 5, [2, 7], (3, 7)
    got = normals(KEY, Purpose.NOISE, step, torch.tensor(slots), shape).flatten(1)
    for row, slot in enumerate(slots):
        for element in range(21):
            words = [int(w) for w in philox(KEY, (element // 4, slot, step, int(Purpose.NOISE)))]
            pair = words[:2] if element % 4 < 2 else words[2:]
            u, v = ((word + 0.5) / 2**32 for word in pair)
            part = (math.cos, math.sin)[element % 2]
            expected = math.sqrt(-2 * math.log(u)) * part(2 * math.pi * v)
            assert abs(got[row, element].item() - expected) <= 2.0**-23 * abs(expected)


def test_box_muller_keeps_its_digits_at_both_ends_of_the_unit_interval():
    """The radius against decimal arithmetic; a float32 logarithm would lose every digit next to u = 1 - 2^-33."""
    getcontext().prec = 30
    for word in (0, 1, 12345, 2**31, 2**32 - 2, 2**32 - 1):
        radius = normal((torch.tensor(word), torch.tensor(0), torch.tensor(word), torch.tensor(0)))  # angle 1.5e-9
        exact = (-2 * ((Decimal(word) + Decimal("0.5")) / 2**32).ln()).sqrt()
        for got in (radius[0], radius[2]):
            assert abs(Decimal(got.item()) / exact - 1) < Decimal(2) ** -23


def test_purposes_steps_slots_and_subjects_share_nothing():
    draws = {}
    keys = {"rex": KEY, "tom": stream_key(0, "tom"), "rex, seed 1": stream_key(1, "rex")}
    for (name, key), purpose, step in itertools.product(keys.items(), Purpose, (0, 1)):
        for slot, row in enumerate(normals(key, purpose, step, torch.arange(3), (256,)).double()):
            draws[name, purpose.name, step, slot] = row
    stacked = torch.stack(list(draws.values()))
    assert len({tuple(row.tolist()) for row in stacked}) == len(draws)
    correlation = torch.corrcoef(stacked).fill_diagonal_(0).abs()
    # Pairs ~ N(0, 1/256); the greatest of 16,110 of them is above 6 standard errors once in 3e4 seeds.
    assert correlation.max().item() < 6 / math.sqrt(256)


def test_uniforms_of_other_purposes_and_steps_are_others():
    named = [
        tuple(uniforms(KEY, purpose, step, torch.arange(4)).tolist()) for purpose in Purpose for step in (0, 1, 2**31)
    ]
    assert len({number for row in named for number in row}) == 4 * 3 * len(Purpose)


def test_far_steps_and_slots_are_distinct():
    a = uniforms(KEY, Purpose.NOISE, 2**31, torch.tensor([2**31 + 5]))
    b = uniforms(KEY, Purpose.NOISE, 0, torch.tensor([5]))
    assert a.item() != b.item()


def test_near_seeds_and_joined_names_have_far_keys():
    keys = {stream_key(seed, subject) for seed in range(200) for subject in ("a", "b", "ab")}
    assert len(keys) == 600
    assert stream_key(0, "a", "b") != stream_key(0, "ab") and stream_key(1, "2") != stream_key(12, "")


def test_permutation_is_one_and_is_not_the_identity():
    orders = [permutation(0, "rex", 0, epoch, 50) for epoch in range(20)]
    for order in orders:
        assert sorted(order) == list(range(50)) and order != list(range(50))
    assert len({tuple(order) for order in orders}) == 20
    assert permutation(0, "rex", 1, 0, 50) != orders[0] != permutation(0, "tom", 0, 0, 50)
    assert permutation(0, "rex", 0, 0, 50) == orders[0]


def test_every_order_of_four_comes_equally_often():
    counts: dict[tuple, int] = {}
    for epoch in range(2400):
        order = tuple(permutation(0, "rex", 0, epoch, 4))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert abs(chi_square - 23) < 5 * math.sqrt(2 * 23)


@pytest.mark.parametrize("count", [0, 1])
def test_permutation_of_nothing_much(count):
    assert permutation(0, "rex", 0, 0, count) == tuple(range(count))


def test_uniform_range_is_a_prefix_stable_stream():
    assert torch.equal(uniform_range(KEY, Purpose.ADAPTER, 100)[:7], uniform_range(KEY, Purpose.ADAPTER, 7))
