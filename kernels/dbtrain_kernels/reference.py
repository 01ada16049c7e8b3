"""The specification of every operation in plain PyTorch: the CPU form, the oracle and the baseline of the kernels.

Each works in the dtype of its inputs, so that float64 inputs give the oracle. Shape letters as in `dbtrain.values`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dbtrain_kernels.philox import Key, normal, philox, uniform

TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda clean, noise, alpha, sigma: noise,  # DDPM, arXiv 2006.11239, eq. 14
    "v_prediction": lambda clean, noise, alpha, sigma: alpha * noise - sigma * clean,  # arXiv 2202.00512, eq. in sec. 4
    "sample": lambda clean, noise, alpha, sigma: clean,
    "flow": lambda clean, noise, alpha, sigma: noise - clean,  # arXiv 2403.03206, eq. 13
}
"""What the denoiser is asked to predict, y, of (clean x, noise eps, alpha, sigma), by parameterization."""


class Loss(NamedTuple):
    """total == sum_b weight_b * per_sample_b. per_sample_B carries no gradient."""

    total: Tensor
    per_sample_B: Tensor


def loss(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    alpha_B: Tensor,
    sigma_B: Tensor,
    weight_B: Tensor,
    parameterization: str,
    mask: Tensor | None = None,
) -> Loss:
    """sum_b W_b * mean|f_b - y_b|^2, and the mean of each sample; `TARGETS` makes y of clean [B, C, H, W] and noise.

    prediction: f, of any floating dtype. alpha_B, sigma_B: signal and noise scales. weight_B: W_b. mask: [B, 1, H, W]
    factors of the squared error. None stands for 1. The mean is over all C*H*W elements in both cases.
    """
    shape = (-1, *[1] * (clean.dim() - 1))
    alpha, sigma = alpha_B.to(clean.dtype).view(shape), sigma_B.to(clean.dtype).view(shape)
    target = TARGETS[parameterization](clean, noise, alpha, sigma)
    error = (prediction.to(target.dtype) - target).square()
    if mask is not None:
        error = error * mask.to(error.dtype)
    per_sample_B = error.flatten(1).mean(1)
    return Loss((per_sample_B * weight_B.to(per_sample_B.dtype)).sum(), per_sample_B.detach())


class Noised(NamedTuple):
    """Clean latents x, noise eps and x_t = alpha x + sigma eps, each [B, C, H, W]; index_B: t."""

    clean: Tensor
    noise: Tensor
    noisy: Tensor
    index_B: Tensor


def noising(
    moments: Tensor,
    key_B2: Tensor,
    slot_B: Tensor,
    step_B: Tensor,
    alpha_S: Tensor,
    sigma_S: Tensor,
    purposes: tuple[int, int, int, int, int],
    scale: float = 1.0,
    shift: float = 0.0,
    noise_offset: float = 0.0,
    first_S: Tensor | None = None,
    strata: int = 0,
) -> Noised:
    """Latents drawn from VAE moments, and noised, with every random number named by (key, purpose, step, slot).

    moments: [B, 2C, H, W] mean and log-variance stacked. key_B2: Philox keys as int64 words. slot_B, step_B: int64
    counter words. purposes: counter words of the posterior sample, the noise, the noise offset, the time and the
    rotation of strata. x = (mean + std z - shift) * scale. eps gets noise_offset times one normal number for each
    channel. alpha_S, sigma_S: signal and noise scales of the schedule. first_S, strata: how `timesteps` draws t.
    """
    mean, logvar = moments.chunk(2, 1)
    shape = mean.shape[1:]
    posterior, noise, constant, *times = purposes
    key = key_B2[:, 0], key_B2[:, 1]
    z = _normals(key, posterior, step_B, slot_B, shape).to(mean.dtype)
    clean = (mean + torch.exp(0.5 * logvar) * z - shift) * scale
    eps = _normals(key, noise, step_B, slot_B, shape).to(mean.dtype)
    if noise_offset:
        channels = _normals(key, constant, step_B, slot_B, torch.Size((shape[0], 1, 1))).to(mean.dtype)
        eps = eps + noise_offset * channels
    index_B = timesteps(key, slot_B, step_B, times, len(alpha_S), first_S, strata)
    alpha, sigma = (table_S[index_B].to(mean.dtype).view(-1, 1, 1, 1) for table_S in (alpha_S, sigma_S))
    return Noised(clean, eps, alpha * clean + sigma * eps, index_B)


def timesteps(
    key: Key, slot_B: Tensor, step_B: Tensor, purposes: list[int], steps: int, first_S: Tensor | None, strata: int
) -> Tensor:
    """Schedule index [B] in 0..steps-1 of each sample, equal in every bit on every device.

    The arithmetic is of integers, or in float64 without a sum of products. first_S: int64, the smallest Philox word
    that gives each index, which inverts any distribution. It is not used where strata > 0: then the samples of a step
    lie one in each of `strata` equal parts of the schedule, rotated together (arXiv 2107.00630, appendix I.1):
    index = floor(steps * frac((slot % strata) / strata + u / strata + rotation)).
    """
    word_B = philox(key, (0, slot_B, step_B, purposes[0]))[0]
    if strata:
        rotation_B = uniform(philox(key, (0, 0, step_B, purposes[1]))[0])
        level_B = ((slot_B % strata).double() / strata + uniform(word_B) / strata + rotation_B) % 1.0
        return (level_B * steps).long().clamp_(max=steps - 1)
    assert first_S is not None
    return torch.searchsorted(first_S, word_B, right=True) - 1


def _normals(key: tuple[Tensor, Tensor], purpose: int, step_B: Tensor, slot_B: Tensor, shape: torch.Size) -> Tensor:
    blocks = torch.arange((shape.numel() + 3) // 4, device=slot_B.device)
    words = philox((key[0][:, None], key[1][:, None]), (blocks[None, :], slot_B[:, None], step_B[:, None], purpose))
    return normal(words).flatten(1)[:, : shape.numel()].reshape(len(slot_B), *shape)


@torch.no_grad()
def adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step_N: Tensor,
    lr_N: Tensor,
    clip_N: Tensor,
    decay_N: Tensor,
    active_N: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    ema: Tensor | None = None,
    ema_decay: float = 0.0,
    compute: Tensor | None = None,
) -> Tensor:
    """Gradient norm [N] of each row before clipping, after one AdamW step (arXiv 1711.05101, algorithm 2) of each row.

    master, grad, exp_avg, exp_avg_sq, ema: [N, P] arenas, changed in place but for grad, which may be bf16. compute: a
    bf16 copy of the masters that follows them, or None. step_N: int64 updates made so far, counted up here. lr_N,
    clip_N (inf never clips), decay_N: float settings of each row. A row that is not active, or whose norm is not
    finite, is left unchanged. The factors of a row are computed in float64 and rounded to the dtype of exp_avg.
    """
    grad = grad.to(exp_avg.dtype)
    norm_N = torch.linalg.vector_norm(grad, dim=1)
    update_N = active_N & torch.isfinite(norm_N)
    step_N += update_N
    lr_N, count_N = lr_N.double(), step_N.double()
    factors = (
        (clip_N.double() / (norm_N.double() + 1e-6)).clamp(max=1.0),
        1 - lr_N * decay_N.double(),
        lr_N / (1 - beta1**count_N),
        (1 - beta2**count_N).rsqrt(),
    )
    clip, keep, rate, spread = (factor.to(exp_avg.dtype)[:, None] for factor in factors)
    for part in _parts(grad):
        mean_part, square_part = exp_avg[:, part], exp_avg_sq[:, part]
        clipped = grad[:, part] * clip
        mean = mean_part + (clipped - mean_part) * (1 - beta1)
        square = square_part * beta2 + clipped * clipped * (1 - beta2)
        value = master[:, part] * keep - rate * mean / (square.sqrt() * spread + eps)
        changed = [(mean_part, mean), (square_part, square), (master[:, part], value)]
        if ema is not None:
            changed.append((ema[:, part], ema[:, part] + (value - ema[:, part]) * (1 - ema_decay)))
        if compute is not None:
            changed.append((compute[:, part], value))
        for arena, new in changed:
            arena.copy_(torch.where(update_N[:, None], new.to(arena.dtype), arena))
    return norm_N


CACHED = 2**16
"""Numbers of an arena of which a processor's cache holds ten copies, so that intermediate values stay in the cache."""


def _parts(arena: Tensor) -> list[slice]:
    """The columns of an arena [N, P], in parts that fit a processor's cache; elsewhere all of them at once."""
    rows, columns = arena.shape
    width = max(1, CACHED // rows) if arena.device.type == "cpu" else columns
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def lora(x: Tensor, base: Tensor, down_NRD: Tensor, up_NDR: Tensor, scale_N: Tensor) -> Tensor:
    """base + scale_n B_n A_n x: the stacked LoRA update (arXiv 2106.09685) of N adapters, each on its own segment of x.

    x [..., D], subject-major: the first 1/N of its tokens belong to adapter 0, and so on. base [..., O]: the frozen
    layer's output. down_NRD: A [N, rank, D]. up_NDR: B [N, O, rank]. All products are in the dtype of base, which under
    autocast is the compute dtype, while x may still have another one.
    """
    x_NTD = x.to(base.dtype).reshape(len(scale_N), -1, x.shape[-1])
    delta_NTO = (x_NTD @ down_NRD.mT.to(base.dtype)) @ up_NDR.mT.to(base.dtype)
    return base + (delta_NTO * scale_N.to(base.dtype)[:, None, None]).reshape(base.shape)


def lora_group(
    x: Tensor, weight: Tensor, bias: Tensor | None, down_NGD: Tensor, up_NOR: Tensor, scale_N: Tensor,
    widths: Sequence[int],
) -> Tensor:  # fmt: skip
    """The outputs [..., O], side by side, of linear layers that all read x, each with its stacked LoRA update.

    weight [O, D] and bias [O]: of the frozen layers, `widths[k]` rows of them layer k's. down_NGD: their A, `rank` of
    the G rows each. up_NOR: their B.
    """
    rank = up_NOR.shape[2]
    bases, ups = F.linear(x, weight, bias).split(list(widths), -1), up_NOR.split(list(widths), 1)
    layers = zip(bases, down_NGD.split(rank, 1), ups)
    return torch.cat([lora(x, base, down_NRD, up_NDR, scale_N) for base, down_NRD, up_NDR in layers], -1)


def geglu(x: Tensor) -> Tensor:
    """value * gelu(gate) [..., H] (arXiv 2002.05202, with the exact gelu), of x [..., 2H]: the values, then their
    gates."""
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value (arXiv 2002.05202)."""
    return F.silu(gate) * value


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = True, shift_BC: Tensor | None = None
) -> Tensor:
    """GroupNorm (arXiv 1803.08494) of x [B, C, H, W] + shift_BC, which None leaves out; then SiLU, if asked."""
    x = x if shift_BC is None else x + shift_BC[:, :, None, None]
    normal = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(normal) if silu else normal


class Normed(NamedTuple):
    """A total of x's shape and its norm."""

    total: Tensor
    normal: Tensor


def residual_norm(
    x: Tensor, scale: Tensor, shift: Tensor | None = None, y: Tensor | None = None, gate: Tensor | None = None,
    eps: float = 1e-6, y_eps: float | None = None, centered: bool = True, unit: bool = False,
) -> Normed:  # fmt: skip
    """total = x + gate * y, and its LayerNorm (arXiv 1607.06450) or, if not `centered`, RMSNorm, with scale and shift.

    x and y, a layer's output: [B, T, D]. y_eps: of an RMSNorm of y; None leaves it out. scale, shift, gate: [D], or
    [B, 1, D] of each sample; the gate holds the weight of y's norm. unit: the norm is multiplied by 1 + scale. None
    stands for x alone, no shift, and a gate of 1.
    """
    if y is not None:
        y = y if y_eps is None else F.rms_norm(y, y.shape[-1:], None, y_eps)
        x = x + (y if gate is None else gate * y)
    normal = F.layer_norm(x, x.shape[-1:], eps=eps) if centered else F.rms_norm(x, x.shape[-1:], None, eps)
    normal = normal * (1 + scale if unit else scale)
    return Normed(x, normal if shift is None else normal + shift)


def rotary(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, halves: bool = False) -> Tensor:
    """RMSNorm (arXiv 1910.07467) of each head of x [B, T, H, D], then the rotary embedding (arXiv 2104.09864).

    cos, sin: [B or 1, T, D / 2] of each pair's angle. A pair is two neighbours, or with `halves` feature i and
    i + D / 2.
    """
    a, b = (F.rms_norm(x, x.shape[-1:], None, eps) * weight).unflatten(-1, (2, -1) if halves else (-1, 2)).unbind(
        -2 if halves else -1
    )
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -2 if halves else -1).flatten(-2).to(x.dtype)
