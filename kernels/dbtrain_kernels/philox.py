"""Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

Integer arithmetic only, so a CPU and a GPU give the same words. Every random number of dbtrain comes from here: the
key says whose it is (run seed and subject), the counter which one it is (element, sample, step, purpose).
"""

import torch
from torch import Tensor

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF


Key = tuple[int, int] | tuple[Tensor, Tensor]
"""Two 32-bit words, or int64 tensors of them that broadcast with the counters."""


def philox(key: Key, counter: tuple[Tensor | int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words in [0, 2^32) as int64 tensors, for each of the broadcast 128-bit counters.

    counter: four int64 tensors (or ints) of 32-bit words that broadcast together. Products of 32-bit words wrap in
    int64, but their bits are the right ones: `>> 32` is masked back to 32 bits.
    """
    device = next((word.device for word in counter if isinstance(word, Tensor)), torch.device("cpu"))
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter)
    k0, k1 = key
    for _ in range(10):
        high_a, low_a = _multiply(c0, ROUND_A)
        high_b, low_b = _multiply(c2, ROUND_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + WEYL_A) & MASK, (k1 + WEYL_B) & MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    product = word * constant
    return (product >> 32) & MASK, product & MASK


def uniform(word: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64, of 32-bit words: (word + 1/2) / 2^32."""
    return (word.double() + 0.5) * 2.0**-32


def normal(words: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Standard normal numbers [..., 4], float32, of four words (Box-Muller, in float64, rounded once at the end).

    Rounding from float64 hides the last-place differences of log, sin and cos between devices. So CPU and GPU agree in
    every bit, except for about one number in 10^8.
    """
    u0, u1, u2, u3 = (uniform(word) for word in words)
    radius_a, radius_b = torch.sqrt(-2 * torch.log(u0)), torch.sqrt(-2 * torch.log(u2))
    angle_a, angle_b = 2 * torch.pi * u1, 2 * torch.pi * u3
    parts = (
        radius_a * torch.cos(angle_a),
        radius_a * torch.sin(angle_a),
        radius_b * torch.cos(angle_b),
        radius_b * torch.sin(angle_b),
    )
    return torch.stack(parts, -1).float()
