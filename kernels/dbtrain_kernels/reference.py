"""The specification of every operation in plain PyTorch: the CPU form, the oracle and the baseline of the kernels.

Each works in the dtype of its inputs, so that float64 inputs give the oracle. Shape letters as in `dbtrain.batch`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dbtrain_kernels.philox import normal, philox, uniform

TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda clean, noise, alpha, sigma: noise,
    "v_prediction": lambda clean, noise, alpha, sigma: alpha * noise - sigma * clean,
    "sample": lambda clean, noise, alpha, sigma: clean,
    "flow": lambda clean, noise, alpha, sigma: noise - clean,
}
"""Target y of (clean x, noise eps, alpha, sigma), by parameterization: the rows of `dbtrain.objective.target`."""


class Loss(NamedTuple):
    """total == sum_b weight_b * per_sample_b, and its parts by subject. per_sample_B carries no gradient."""

    total: Tensor
    per_sample_B: Tensor
    per_subject_N: Tensor


def loss(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    alpha_B: Tensor,
    sigma_B: Tensor,
    weight_B: Tensor,
    parameterization: str,
    subject_B: Tensor | None = None,
    subjects: int = 1,
    mask: Tensor | None = None,
) -> Loss:
    """sum_b W_b * mean|f_b - y_b|^2, per sample and per subject, with y made from clean [B, C, H, W] and noise.

    prediction: f, of any floating dtype. alpha_B, sigma_B: signal and noise scales. weight_B: W_b. subject_B: each
    sample's subject in 0..subjects-1, or None where there is one subject. mask: [B, 1, H, W] factors of the squared
    error, or None for 1; the mean is over all C*H*W elements either way.
    """
    shape = (-1, *[1] * (clean.dim() - 1))
    alpha, sigma = alpha_B.to(clean.dtype).view(shape), sigma_B.to(clean.dtype).view(shape)
    target = TARGETS[parameterization](clean, noise, alpha, sigma)
    error = (prediction.to(target.dtype) - target).square()
    if mask is not None:
        error = error * mask.to(error.dtype)
    per_sample_B = error.flatten(1).mean(1)
    weighted_B = per_sample_B * weight_B.to(per_sample_B.dtype)
    total = weighted_B.sum()
    if subject_B is None:
        return Loss(total, per_sample_B.detach(), total[None])
    mine_NB = torch.arange(subjects, device=clean.device)[:, None] == subject_B
    return Loss(total, per_sample_B.detach(), torch.where(mine_NB, weighted_B, 0.0).sum(1))


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
    row_B: Tensor | None = None,
    index_B: Tensor | None = None,
    first_S: Tensor | None = None,
    strata: int = 0,
) -> Noised:
    """Latents drawn from VAE moments, and noised, with every random number named by (key, purpose, step, slot).

    moments: [M, 2C, H, W] mean and log-variance stacked. row_B: each sample's row of moments, or None for row b.
    key_B2: Philox keys as int64 words; slot_B, step_B: int64 counter words. purposes: counter words of the posterior
    sample, the noise, the noise offset, the time and the rotation of strata. x = (mean + std z - shift) * scale; eps
    gets noise_offset times one normal number for each channel.

    alpha_S, sigma_S: signal and noise scales of the schedule. index_B: each sample's step of it; where it is None,
    `timesteps` draws it.
    """
    mean, logvar = (moments if row_B is None else moments[row_B]).chunk(2, 1)
    shape = mean.shape[1:]
    posterior, noise, constant, *times = purposes
    z = _normals(key_B2, posterior, step_B, slot_B, shape).to(mean.dtype)
    clean = (mean + torch.exp(0.5 * logvar) * z - shift) * scale
    eps = _normals(key_B2, noise, step_B, slot_B, shape).to(mean.dtype)
    if noise_offset:
        channels = _normals(key_B2, constant, step_B, slot_B, torch.Size((shape[0], 1, 1))).to(mean.dtype)
        eps = eps + noise_offset * channels
    if index_B is None:
        index_B = timesteps(key_B2, slot_B, step_B, (times[0], times[1]), len(alpha_S), first_S, strata)
    alpha, sigma = (table_S[index_B].to(mean.dtype).view(-1, 1, 1, 1) for table_S in (alpha_S, sigma_S))
    return Noised(clean, eps, alpha * clean + sigma * eps, index_B)


def timesteps(
    key_B2: Tensor,
    slot_B: Tensor,
    step_B: Tensor,
    purposes: tuple[int, int],
    steps: int,
    first_S: Tensor | None,
    strata: int,
) -> Tensor:
    """Schedule index [B] in 0..steps-1 of each sample; in integers or exact float64, so equal in every bit anywhere.

    first_S: int64, the smallest Philox word that gives each index, which is any distribution's inverse; not looked at
    where strata > 0. Then the samples of a step lie one in each of `strata` equal parts of the schedule, rotated
    together: index = floor(steps * frac((slot % strata) / strata + u / strata + rotation)).
    """
    key = key_B2[:, 0], key_B2[:, 1]
    word_B = philox(key, (0, slot_B, step_B, purposes[0]))[0]
    if strata:
        rotation_B = uniform(philox(key, (0, 0, step_B, purposes[1]))[0])
        level_B = ((slot_B % strata).double() / strata + uniform(word_B) / strata + rotation_B) % 1.0
        return (level_B * steps).long().clamp_(max=steps - 1)
    if first_S is None:
        raise ValueError("noising: got neither index_B nor first_S nor strata, want one of them")
    return torch.searchsorted(first_S, word_B, right=True) - 1


def _normals(key_B2: Tensor, purpose: int, step_B: Tensor, slot_B: Tensor, shape: torch.Size) -> Tensor:
    blocks = torch.arange((shape.numel() + 3) // 4, device=slot_B.device)
    key = key_B2[:, 0, None], key_B2[:, 1, None]
    words = philox(key, (blocks[None, :], slot_B[:, None], step_B[:, None], purpose))
    return normal(words).flatten(1)[:, : shape.numel()].reshape(len(slot_B), *shape)


ROUNDING = 11
"""Counter word of AdamW's stochastic rounding: `dbtrain.randomness.Purpose.ROUNDING`."""


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
    rounding_N2: Tensor | None = None,
) -> Tensor:
    """Gradient norm [N] of each row before clipping, after one AdamW step (arXiv 1711.05101, algorithm 2) of each row.

    master, grad, exp_avg, exp_avg_sq, ema: [N, P] arenas, changed in place but for grad. step_N: int64 updates made so
    far, counted up here. lr_N, clip_N (inf never clips), decay_N: float settings of each row. A row that is not active,
    or whose norm is not finite, stays as it is in every bit. Settings act in float64, rounded to the moments' dtype.

    Full fine-tuning is the flat form, one row: grad may be bf16, compute is a bf16 copy of the weights that follows
    the masters, and master may itself be bf16 where there are no fp32 masters. rounding_N2: Philox keys; bf16 weights
    are then rounded up or down at random, in proportion (arXiv 2010.06192), and to the nearest where it is None.
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
        value = master[:, part].to(exp_avg.dtype) * keep - rate * mean / (square.sqrt() * spread + eps)
        changed = [(mean_part, mean), (square_part, square), (master[:, part], value)]
        if ema is not None:
            changed.append((ema[:, part], ema[:, part] + (value - ema[:, part]) * (1 - ema_decay)))
        if compute is not None:
            changed.append((compute[:, part], value))
        for arena, new in changed:
            if rounding_N2 is not None and arena.dtype == torch.bfloat16:
                new = round_at_random(new, rounding_N2, step_N, part.start)
            arena.copy_(torch.where(update_N[:, None], new.to(arena.dtype), arena))
    return norm_N


CACHED = 2**16
"""Numbers of an arena that a processor's cache holds ten times over: the update's intermediate values stay there."""


def _parts(arena: Tensor) -> list[slice]:
    """The columns of an arena [N, P], in parts that fit a processor's cache; elsewhere all of them at once."""
    rows, columns = arena.shape
    width = max(4, CACHED // rows // 4 * 4) if arena.device.type == "cpu" else columns
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def round_at_random(value: Tensor, key_N2: Tensor, step_N: Tensor, first: int = 0) -> Tensor:
    """bf16 [N, P]: each fp32 number rounded to one of its two bf16 neighbours, the nearer one more often; unbiased.

    The 16 bits that bf16 drops get 16 random bits added, and are cut off. Element i takes word i % 4 of the Philox
    counter (i // 4, 0, step, ROUNDING) under its row's key. first: the number of the first element, a multiple of 4.
    """
    blocks = torch.arange(first // 4, first // 4 + (value.shape[1] + 3) // 4, device=value.device)
    words = philox((key_N2[:, 0, None], key_N2[:, 1, None]), (blocks[None, :], 0, step_N[:, None], ROUNDING))
    random = torch.stack(words, -1).flatten(1)[:, : value.shape[1]] & 0xFFFF
    bits = value.float().view(torch.int32)
    cut = ((bits.long() + random) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(value), cut, value.float()).bfloat16()


def lora(x: Tensor, base: Tensor, down_NRD: Tensor, up_NDR: Tensor, scale_N: Tensor) -> Tensor:
    """base + scale_n B_n A_n x: the stacked LoRA update (arXiv 2106.09685) of N adapters, each on its own segment of x.

    x [..., D], subject-major: the first 1/N of its tokens belong to adapter 0, and so on; base [..., O]: the frozen
    layer's output. down_NRD: A [N, rank, D]; up_NDR: B [N, O, rank]. All act in base's dtype, which under autocast is
    the compute dtype, whatever x came in.
    """
    x_NTD = x.to(base.dtype).reshape(len(scale_N), -1, x.shape[-1])
    delta_NTO = (x_NTD @ down_NRD.mT.to(base.dtype)) @ up_NDR.mT.to(base.dtype)
    return base + (delta_NTO * scale_N.to(base.dtype)[:, None, None]).reshape(base.shape)
