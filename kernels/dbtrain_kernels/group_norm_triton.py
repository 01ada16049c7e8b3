"""Triton kernels of GroupNorm with SiLU, of pictures whose channels come last or first. Sums have a fixed order.

Forward: moments of each channel over PIXELS pixels at a time, merged to those of a group, then every number. Backward:
the same with the two sums that the gradient needs. A picture's sums depend on no other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS, CHANNELS = 128, 64
"""Sides of a program's tile: a row of 64 channels is 128 bytes of bf16."""
ROWS = 16
"""Parts of the sums that are merged at a time."""
WARPS = 8


@triton.jit
def tile_of(pixels, channels, pixel_stride, channel_stride, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """(places in a tensor, which of them exist, channels, which of them exist) of this program's tile."""
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.program_id(2).to(tl.int64) * pixels * channels
    inside = (p[:, None] < pixels) & (c[None, :] < channels)
    return start + p[:, None] * pixel_stride + c[None, :] * channel_stride, inside, c, c < channels


@triton.jit
def normal_of(x, CENTER, SCALE, BIAS, c, there, channels):
    """(x - center, (x - center) scale + bias, scale) of a tile."""
    at = tl.program_id(2).to(tl.int64) * channels + c
    center = tl.load(CENTER + at, mask=there, other=0.0)
    scale = tl.load(SCALE + at, mask=there, other=0.0)
    bias = tl.load(BIAS + c, mask=there, other=0.0).to(tl.float32)
    off = x - center[None, :]
    return off, off * scale[None, :] + bias[None, :], scale


@triton.jit
def slope_of(z):
    """The derivative of z sigmoid(z)."""
    share = tl.sigmoid(z)
    return share + z * share * (1.0 - share)


@triton.jit
def channel_moments(
    X, MEAN, SPREAD, pixels, channels, pixel_stride, channel_stride, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Mean, and sum of squared distances from it, of each channel over a part of the pixels: [B, parts, C]."""
    at, inside, c, there = tile_of(pixels, channels, pixel_stride, channel_stride, PIXELS, CHANNELS)
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(PIXELS, pixels - tl.program_id(0) * PIXELS)
    mean = tl.sum(x, 0) / count
    off = tl.where(inside, x - mean[None, :], 0.0)
    into = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * channels + c
    tl.store(MEAN + into, mean, mask=there)
    tl.store(SPREAD + into, tl.sum(off * off, 0), mask=there)


@triton.jit
def group_moments(
    MEAN, SPREAD, SHIFT, WEIGHT, CENTER, SCALE, RSTD, pixels, channels, size, parts, eps, SHIFTED: tl.constexpr,
    PIXELS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """What normalizes each channel, as (x - center) scale + bias: center = mean - shift, scale = weight / root of the
    variance. The group's mean first, then the sum of squared distances from it (Chan's formula)."""
    group, me = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = tl.arange(0, SIZE)
    c, there = group * size + own, own < size
    shift = tl.zeros([SIZE], tl.float32)
    if SHIFTED:
        shift = tl.load(SHIFT + me * channels + c, mask=there, other=0.0).to(tl.float32)
    sums = tl.zeros([SIZE], tl.float32)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)
        at, inside = (me * parts + row[:, None]) * channels + c[None, :], (row[:, None] < parts) & there[None, :]
        count = tl.minimum(PIXELS, pixels - row * PIXELS).to(tl.float32)
        sums += tl.sum(tl.where(inside, tl.load(MEAN + at, mask=inside, other=0.0) * count[:, None], 0.0), 0)
    total = size * pixels
    mean = tl.sum(tl.where(there, sums + shift * pixels, 0.0), 0) / total
    spread = tl.zeros([SIZE], tl.float32)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)
        at, inside = (me * parts + row[:, None]) * channels + c[None, :], (row[:, None] < parts) & there[None, :]
        count = tl.minimum(PIXELS, pixels - row * PIXELS).to(tl.float32)
        off = tl.load(MEAN + at, mask=inside, other=0.0) + shift[None, :] - mean
        own_spread = tl.load(SPREAD + at, mask=inside, other=0.0)
        spread += tl.sum(tl.where(inside, own_spread + off * off * count[:, None], 0.0), 0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(spread, 0) / total + eps)
    weight = tl.load(WEIGHT + c, mask=there, other=0.0).to(tl.float32)
    tl.store(CENTER + me * channels + c, mean - shift, mask=there)
    tl.store(SCALE + me * channels + c, rstd * weight, mask=there)
    tl.store(RSTD + me * tl.num_programs(0) + group, rstd)


@triton.jit
def normalize(
    X, Y, CENTER, SCALE, BIAS, pixels, channels, pixel_stride, channel_stride, SILU: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = silu(z), or z, with z = (x - center) scale + bias."""
    at, inside, c, there = tile_of(pixels, channels, pixel_stride, channel_stride, PIXELS, CHANNELS)
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    _, z, _ = normal_of(x, CENTER, SCALE, BIAS, c, there, channels)
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(Y + at, z.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def channel_slopes(
    GRAD, X, CENTER, SCALE, BIAS, PLAIN, TILTED, pixels, channels, pixel_stride, channel_stride, SILU: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of dz, and of dz (x - center), of each channel over a part of the pixels: [B, parts, C]."""
    at, inside, c, there = tile_of(pixels, channels, pixel_stride, channel_stride, PIXELS, CHANNELS)
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + at, mask=inside, other=0.0).to(tl.float32)
    off, z, _ = normal_of(x, CENTER, SCALE, BIAS, c, there, channels)
    if SILU:
        grad = grad * slope_of(z)
    into = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * channels + c
    tl.store(PLAIN + into, tl.sum(grad, 0), mask=there)
    tl.store(TILTED + into, tl.sum(grad * off, 0), mask=there)


@triton.jit
def group_slopes(
    PLAIN, TILTED, WEIGHT, RSTD, LEVEL, TILT, pixels, channels, size, parts, ROWS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """What is taken off each channel's scale dz, as level + tilt (x - center): means over the group."""
    group, me = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = tl.arange(0, SIZE)
    c, there = group * size + own, own < size
    plain, tilted = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)
        at, inside = (me * parts + row[:, None]) * channels + c[None, :], (row[:, None] < parts) & there[None, :]
        plain += tl.sum(tl.load(PLAIN + at, mask=inside, other=0.0), 0)
        tilted += tl.sum(tl.load(TILTED + at, mask=inside, other=0.0), 0)
    weight = tl.load(WEIGHT + c, mask=there, other=0.0).to(tl.float32)
    at = me * tl.num_programs(0) + group
    rstd, total = tl.load(RSTD + at), size * pixels
    tl.store(LEVEL + at, rstd * tl.sum(plain * weight, 0) / total)
    tl.store(TILT + at, rstd * rstd * rstd * tl.sum(tilted * weight, 0) / total)


@triton.jit
def normal_gradient(
    GRAD, X, CENTER, SCALE, BIAS, LEVEL, TILT, OF_X, pixels, channels, size, pixel_stride, channel_stride,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx = scale dz - level - tilt (x - center)."""
    at, inside, c, there = tile_of(pixels, channels, pixel_stride, channel_stride, PIXELS, CHANNELS)
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + at, mask=inside, other=0.0).to(tl.float32)
    off, z, scale = normal_of(x, CENTER, SCALE, BIAS, c, there, channels)
    if SILU:
        grad = grad * slope_of(z)
    groups = tl.program_id(2).to(tl.int64) * (channels // size) + c // size
    level, tilt = tl.load(LEVEL + groups, mask=there, other=0.0), tl.load(TILT + groups, mask=there, other=0.0)
    dx = grad * scale[None, :] - level[None, :] - off * tilt[None, :]
    tl.store(OF_X + at, dx.to(OF_X.dtype.element_ty), mask=inside)


def _sizes(x: Tensor) -> tuple[int, int, int, tuple[int, int, int], tuple[int, int]]:
    """Pictures, channels, pixels; the grid of tiles; and strides of a pixel and a channel, of dense x [B, C, H, W]."""
    batch, channels, pixels = x.shape[0], x.shape[1], x[0, 0].numel()
    grid = triton.cdiv(pixels, PIXELS), triton.cdiv(channels, CHANNELS), batch
    return batch, channels, pixels, grid, (1, pixels) if x.is_contiguous() else (channels, 1)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, shift_BC: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, center_BC, scale_BC, rstd_BG) of x [B, C, H, W], dense with channels first or last."""
    batch, channels, pixels, grid, strides = _sizes(x)
    parts, size = grid[0], channels // groups
    means, spreads = (x.new_empty((batch, parts, channels), dtype=torch.float32) for _ in "ab")
    center_BC, scale_BC = (x.new_empty((batch, channels), dtype=torch.float32) for _ in "ab")
    rstd_BG, y = x.new_empty((batch, groups), dtype=torch.float32), torch.empty_like(x)
    tile = {"PIXELS": PIXELS, "CHANNELS": CHANNELS, "num_warps": WARPS}
    channel_moments[grid](x, means, spreads, pixels, channels, *strides, **tile)
    group_moments[(groups, batch)](
        means, spreads, weight if shift_BC is None else shift_BC, weight, center_BC, scale_BC, rstd_BG, pixels,
        channels, size, parts, eps, SHIFTED=shift_BC is not None, PIXELS=PIXELS, ROWS=ROWS,
        SIZE=triton.next_power_of_2(size),
    )  # fmt: skip
    normalize[grid](x, y, center_BC, scale_BC, bias, pixels, channels, *strides, SILU=silu, **tile)
    return y, center_BC, scale_BC, rstd_BG


def backward(
    grad: Tensor, x: Tensor, center_BC: Tensor, scale_BC: Tensor, rstd_BG: Tensor, weight: Tensor, bias: Tensor,
    silu: bool,
) -> Tensor:  # fmt: skip
    """The gradient of x; `grad` lies in memory as x does."""
    batch, channels, pixels, grid, strides = _sizes(x)
    parts, groups = grid[0], rstd_BG.shape[1]
    size = channels // groups
    plain, tilted = (x.new_empty((batch, parts, channels), dtype=torch.float32) for _ in "ab")
    level_BG, tilt_BG = torch.empty_like(rstd_BG), torch.empty_like(rstd_BG)
    normal, of_x = (center_BC, scale_BC, bias), torch.empty_like(x)
    tile = {"SILU": silu, "PIXELS": PIXELS, "CHANNELS": CHANNELS, "num_warps": WARPS}
    channel_slopes[grid](grad, x, *normal, plain, tilted, pixels, channels, *strides, **tile)
    group_slopes[(groups, batch)](
        plain, tilted, weight, rstd_BG, level_BG, tilt_BG, pixels, channels, size, parts, ROWS=ROWS,
        SIZE=triton.next_power_of_2(size),
    )  # fmt: skip
    normal_gradient[grid](
        grad, x, *normal, level_BG, tilt_BG, of_x, pixels, channels, size, *strides, **tile
    )  # fmt: skip
    return of_x
