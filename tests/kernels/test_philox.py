"""Philox4x32-10 against Random123's known answers and a big-integer transcription of the paper; its distributions."""

import itertools
import math

import pytest
import torch

from dbtrain_kernels.philox import normal, philox, uniform

KNOWN = [  # Random123, tests/kat_vectors: counter, key, result of `philox4x32 10`
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter, key):
    """The generator in Python's unbounded integers, which cannot overflow."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(counter, key, words):
    assert tuple(int(word) for word in philox(key, counter)) == words
    assert plain_philox(counter, key) == words


def test_wide_counters_do_not_overflow():
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    counters = list(itertools.product(edges, repeat=4))
    columns = torch.tensor(counters).unbind(1)
    for key in ((0, 0), (2**31, 2**32 - 1)):
        got = torch.stack(philox(key, columns), 1).tolist()
        assert [tuple(row) for row in got] == [plain_philox(counter, key) for counter in counters]


def test_counters_broadcast():
    rows, columns = torch.arange(3)[:, None], torch.arange(5)[None]
    words = philox((7, 8), (rows, columns, 2, 1))
    assert words[3].shape == (3, 5)
    assert int(words[3][2, 4]) == plain_philox((2, 4, 2, 1), (7, 8))[3]


def test_uniform_stays_inside_the_open_interval():
    ends = uniform(torch.tensor([0, 2**32 - 1]))
    assert ends.tolist() == [2.0**-33, 1 - 2.0**-33]


def test_normal_at_the_ends_is_finite():
    worst = normal(tuple(torch.tensor([0, 2**32 - 1]) for _ in range(4)))
    assert torch.isfinite(worst).all()
    assert worst.abs().max() <= math.sqrt(2 * 33 * math.log(2)) * (1 + 2**-23)  # |z| of the smallest uniform, 2^-33


def test_moments_of_a_quarter_million_normals():
    z = normal(philox((1, 2), (torch.arange(2**16), 0, 0, 1))).double().flatten()
    n = len(z)
    # Five standard errors: Var z = 1, Var z^2 = 2, Var z^3 = 15, Var z^4 = 96.
    for power, (expected, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((z**power).mean().item() - expected) < 5 * math.sqrt(variance / n), power


def test_the_four_normals_of_a_block_are_independent():
    z = normal(philox((1, 2), (torch.arange(2**16), 0, 0, 1))).double()
    for a, b in itertools.combinations(range(4), 2):
        for f in (lambda x: x, torch.abs):  # a shared radius shows only in magnitudes
            correlation = torch.corrcoef(torch.stack([f(z[:, a]), f(z[:, b])]))[0, 1].item()
            assert abs(correlation) < 5 / math.sqrt(len(z)), (a, b)


def test_words_are_uniform_by_chi_square():
    words = torch.stack(philox((3, 4), (torch.arange(2**16), 0, 0, 1))).flatten()
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((words >> shift) & 255, minlength=256).double()
        expected = len(words) / 256
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)  # mean k - 1, variance 2 (k - 1)


@pytest.mark.parametrize("word", range(4))
def test_one_counter_bit_flips_half_of_the_output_bits(word):
    counter = [torch.arange(512), 3, 5, 7]
    before = torch.stack(philox((1, 2), tuple(counter)))
    counter[word] = torch.as_tensor(counter[word]) ^ 1
    flipped = torch.stack(philox((1, 2), tuple(counter))) ^ before
    bits = sum(bin(value).count("1") for value in flipped.flatten().tolist())
    n = 512 * 128
    assert abs(bits - n / 2) < 5 * math.sqrt(n / 4)
