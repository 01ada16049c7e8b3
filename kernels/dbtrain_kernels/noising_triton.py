"""Triton kernels of fused noising: Philox words bit for bit as `philox.philox`, normal numbers in fp32.

Libraries differ in log, sin and cos. So the normal numbers are made with +, -, *, IEEE division and IEEE square root
only, after ranges are reduced on the integers. Each number has a bound of its relative error, and devices differ only
where one of them computes a*b + c with one rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
"""Philox counters of a program; each makes four elements."""


@triton.jit
def philox_words(k0, k1, c0, c1, c2, c3):
    """Philox4x32-10: the four uint32 words of `philox.philox`, from uint32 words that broadcast together."""
    zero = c0 * 0
    k0, k1, c1, c2, c3 = k0 + zero, k1 + zero, c1 + zero, c2 + zero, c3 + zero
    a, b = zero + 0xD2511F53, zero + 0xCD9E8D57
    for _ in tl.static_range(10):
        high_a, low_a = tl.umulhi(c0, a), c0 * a
        high_b, low_b = tl.umulhi(c2, b), c2 * b
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def minus_log_uniform(word):
    """-log((word + 1/2) / 2^32) with a relative error below 8 * 2^-24.

    For a number above 1/2, the word's complement gives the distance to 1 without cancellation. For one below, exponent
    and mantissa are taken apart. Both end in -log m = 2 atanh((1 - m) / (1 + m)), whose argument is at most 1/3.
    """
    high = word >= 0x80000000
    distance = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # 0x3F3504F3 is sqrt(1/2): mantissas lie in [sqrt(1/2), sqrt(2))
    mantissa = (bits - exponent * 8388608).to(tl.float32, bitcast=True)
    s = tl.div_rn(tl.where(high, distance, 1.0 - mantissa), tl.where(high, 2.0 - distance, 1.0 + mantissa))
    q = s * s
    series = 1.0 / 13 + q * (1.0 / 15)
    series = 1.0 / 9 + q * (1.0 / 11 + q * series)
    series = 1.0 / 5 + q * (1.0 / 7 + q * series)
    series = 1.0 + q * (1.0 / 3 + q * series)
    return 2.0 * s * series - tl.where(high, 0, exponent).to(tl.float32) * 0.6931471805599453


@triton.jit
def cos_sin_turn(word):
    """cos and sin of 2 pi (word + 1/2) / 2^32, each with a relative error below 6 * 2^-24.

    The quadrant is taken off the integer, without rounding. Taylor polynomials compute the rest, |x| <= pi/4.
    """
    shifted = word + 0x20000000
    quadrant = shifted >> 30
    rest = (shifted & 0x3FFFFFFF).to(tl.int32) - 0x20000000
    x = (rest.to(tl.float32) + 0.5) * 1.4629180792671596e-09  # 2 pi / 2^32
    q = x * x
    sine = x + x * q * (-1.0 / 6 + q * (1.0 / 120 + q * (-1.0 / 5040 + q * (1.0 / 362880))))
    cosine = 1.0 + q * (-0.5 + q * (1.0 / 24 + q * (-1.0 / 720 + q * (1.0 / 40320 + q * (-1.0 / 3628800)))))
    odd = (quadrant & 1) == 1
    a, b = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where((quadrant == 1) | (quadrant == 2), -a, a), tl.where(quadrant >= 2, -b, b)


@triton.jit
def four_normals(k0, k1, c0, c1, c2, c3):
    """The four standard normal numbers of a counter, as `philox.normal` of its words."""
    w0, w1, w2, w3 = philox_words(k0, k1, c0, c1, c2, c3)
    radius_a, radius_b = tl.sqrt_rn(2.0 * minus_log_uniform(w0)), tl.sqrt_rn(2.0 * minus_log_uniform(w2))
    cos_a, sin_a = cos_sin_turn(w1)
    cos_b, sin_b = cos_sin_turn(w3)
    return radius_a * cos_a, radius_a * sin_a, radius_b * cos_b, radius_b * sin_b


@triton.jit
def in_element_order(z0, z1, z2, z3, SIZE: tl.constexpr):
    """[4 * SIZE]: z0[0], z1[0], z2[0], z3[0], z0[1], ..."""
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [4 * SIZE])


@triton.jit
def place_in_schedule(
    k0, k1, slot, step, first, steps,
    TIME: tl.constexpr, ROTATION: tl.constexpr, STRATA: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """`reference.timesteps` of one sample: by comparing integers, or in float64 without a sum of products."""
    zero = k0 * 0
    word, _, _, _ = philox_words(k0, k1, zero, slot.to(tl.uint32), step, zero + TIME)
    if STRATA > 0:
        turn, _, _, _ = philox_words(k0, k1, zero, zero, step, zero + ROTATION)
        u = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        rotation = (turn.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        level = (slot % STRATA).to(tl.float64) / STRATA + u / STRATA + rotation
        index = ((level - tl.floor(level)) * steps).to(tl.int64)
        return tl.minimum(index, steps - 1)
    places = tl.arange(0, STEPS)
    firsts = tl.load(first + places, mask=places < steps, other=1 << 40)
    return tl.sum((firsts <= word.to(tl.int64)).to(tl.int64), 0) - 1


@triton.jit
def noise_latents(
    moments, key, slot, step, alpha, sigma, first, drawn, clean, noise, noisy,
    elements, plane, steps, scale, shift, noise_offset,
    POSTERIOR: tl.constexpr, NOISE: tl.constexpr, CONSTANT: tl.constexpr, TIME: tl.constexpr, ROTATION: tl.constexpr,
    OFFSET: tl.constexpr, STRATA: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """clean, noise and noisy [B, elements] of one sample's 4 * BLOCK elements, and its place in the schedule."""
    sample = tl.program_id(0).to(tl.int64)
    k0, k1 = tl.load(key + 2 * sample).to(tl.uint32), tl.load(key + 2 * sample + 1).to(tl.uint32)
    slot_64 = tl.load(slot + sample)
    c1, c2 = slot_64.to(tl.uint32), tl.load(step + sample).to(tl.uint32)
    s = place_in_schedule(k0, k1, slot_64, c2, first, steps, TIME, ROTATION, STRATA, STEPS)
    tl.store(drawn + sample, s, mask=tl.program_id(1) == 0)
    counter = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    place = tl.program_id(1) * BLOCK * 4 + tl.arange(0, 4 * BLOCK)
    inside = place < elements

    z0, z1, z2, z3 = four_normals(k0, k1, counter, c1, c2, POSTERIOR)
    z = in_element_order(z0, z1, z2, z3, BLOCK)
    e0, e1, e2, e3 = four_normals(k0, k1, counter, c1, c2, NOISE)
    eps = in_element_order(e0, e1, e2, e3, BLOCK)
    if OFFSET:
        channel = place // plane
        o0, o1, o2, o3 = four_normals(k0, k1, (channel // 4).to(tl.uint32), c1, c2, CONSTANT)
        which = channel % 4
        constant = tl.where(which < 2, tl.where(which == 0, o0, o1), tl.where(which == 2, o2, o3))
        eps += noise_offset * constant

    mean = tl.load(moments + sample * 2 * elements + place, mask=inside, other=0.0)
    logvar = tl.load(moments + sample * 2 * elements + elements + place, mask=inside, other=0.0)
    x = (mean + tl.exp(0.5 * logvar) * z - shift) * scale
    x_t = tl.load(alpha + s) * x + tl.load(sigma + s) * eps
    at = sample * elements + place
    tl.store(clean + at, x, mask=inside)
    tl.store(noise + at, eps, mask=inside)
    tl.store(noisy + at, x_t, mask=inside)


def launch(
    moments: Tensor, key_B2: Tensor, slot_B: Tensor, step_B: Tensor, alpha_S: Tensor, sigma_S: Tensor,
    purposes: list[int], scale: float, shift: float, noise_offset: float, first_S: Tensor | None, strata: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(clean, noise, noisy), each [B, C, H, W] in fp32, and index_B; of contiguous tensors."""
    samples, channels, *sides = moments.shape
    clean, noise, noisy = (moments.new_empty(samples, channels // 2, *sides) for _ in range(3))
    index_B, elements, steps = torch.empty_like(slot_B), clean[0].numel(), len(alpha_S)
    names = ("POSTERIOR", "NOISE", "CONSTANT", "TIME", "ROTATION")
    noise_latents[(samples, triton.cdiv(elements, 4 * BLOCK))](
        moments, key_B2, slot_B, step_B, alpha_S, sigma_S, slot_B if first_S is None else first_S,
        index_B, clean, noise, noisy, elements, clean[0, 0].numel(), steps, scale, shift, noise_offset,
        **dict(zip(names, purposes)), OFFSET=noise_offset != 0,
        STRATA=strata, STEPS=triton.next_power_of_2(steps), BLOCK=BLOCK,
    )  # fmt: skip
    return clean, noise, noisy, index_B
