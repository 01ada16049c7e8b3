"""The specification of every operation in plain PyTorch: the CPU form, the oracle and the baseline of the kernels.

Each works in the dtype of its inputs, so that float64 inputs give the oracle. Shape letters as in `dbtrain.batch`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dbtrain_kernels.philox import normal, philox

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
    """Clean latents x, noise eps and x_t = alpha x + sigma eps, each [B, C, H, W]."""

    clean: Tensor
    noise: Tensor
    noisy: Tensor


def noising(
    moments: Tensor,
    key_B2: Tensor,
    slot_B: Tensor,
    step_B: Tensor,
    alpha_B: Tensor,
    sigma_B: Tensor,
    purposes: tuple[int, int, int],
    scale: float = 1.0,
    shift: float = 0.0,
    noise_offset: float = 0.0,
    row_B: Tensor | None = None,
) -> Noised:
    """Latents drawn from VAE moments, and noised, with every random number named by (key, purpose, step, slot).

    moments: [M, 2C, H, W] mean and log-variance stacked. row_B: each sample's row of moments, or None for row b.
    key_B2: Philox keys as int64 words; slot_B, step_B: int64 counter words. purposes: counter words of the posterior
    sample, the noise and the noise offset. x = (mean + std z - shift) * scale; eps gets noise_offset times one normal
    number for each channel.
    """
    mean, logvar = (moments if row_B is None else moments[row_B]).chunk(2, 1)
    shape = mean.shape[1:]
    posterior, noise, constant = purposes
    z = _normals(key_B2, posterior, step_B, slot_B, shape).to(mean.dtype)
    clean = (mean + torch.exp(0.5 * logvar) * z - shift) * scale
    eps = _normals(key_B2, noise, step_B, slot_B, shape).to(mean.dtype)
    if noise_offset:
        channels = _normals(key_B2, constant, step_B, slot_B, torch.Size((shape[0], 1, 1))).to(mean.dtype)
        eps = eps + noise_offset * channels
    alpha, sigma = (level.to(mean.dtype).view(-1, 1, 1, 1) for level in (alpha_B, sigma_B))
    return Noised(clean, eps, alpha * clean + sigma * eps)


def _normals(key_B2: Tensor, purpose: int, step_B: Tensor, slot_B: Tensor, shape: torch.Size) -> Tensor:
    blocks = torch.arange((shape.numel() + 3) // 4, device=slot_B.device)
    key = key_B2[:, 0, None], key_B2[:, 1, None]
    words = philox(key, (blocks[None, :], slot_B[:, None], step_B[:, None], purpose))
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
) -> Tensor:
    """Gradient norm [N] of each row before clipping, after one AdamW step (arXiv 1711.05101, algorithm 2) of each row.

    master, grad, exp_avg, exp_avg_sq, ema: [N, P] arenas, changed in place but for grad. step_N: int64 updates made so
    far, counted up here. lr_N, clip_N (inf never clips), decay_N: float settings of each row. A row that is not active,
    or whose norm is not finite, stays as it is in every bit. Settings act in float64, rounded to the arena's dtype.
    """
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
    clip, keep, rate, spread = (factor.to(master.dtype)[:, None] for factor in factors)
    clipped = grad * clip
    mean = exp_avg + (clipped - exp_avg) * (1 - beta1)
    square = exp_avg_sq * beta2 + clipped * clipped * (1 - beta2)
    value = master * keep - rate * mean / (square.sqrt() * spread + eps)
    changed = [(exp_avg, mean), (exp_avg_sq, square), (master, value)]
    if ema is not None:
        changed.append((ema, ema + (value - ema) * (1 - ema_decay)))
    for arena, new in changed:
        arena.copy_(torch.where(update_N[:, None], new, arena))
    return norm_N
