"""Loss weights as functions of SNR.

Each weighting is defined once, by the weight it puts on the error of the *clean image* x0; the same error seen through
another parameterization carries the factor of `X0_ERROR`. So Min-SNR is right for eps and v without a case of its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dbtrain.objective import WEIGHTINGS, load
from dbtrain.objective.noise import Schedule

X0_ERROR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "epsilon": lambda alpha, sigma: (sigma / alpha) ** 2,
    "v_prediction": lambda alpha, sigma: sigma**2 / (alpha**2 + sigma**2),
    "sample": lambda alpha, sigma: torch.ones_like(alpha),
    "flow": lambda alpha, sigma: sigma**2,
}
"""|x0 error|^2 / |prediction error|^2 at (alpha, sigma), by parameterization."""


def none(snr_S: Tensor, factor_S: Tensor, gamma: float) -> Tensor:
    """1: the plain loss of the parameterization."""
    return torch.ones_like(snr_S)


def min_snr(snr_S: Tensor, factor_S: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) on x0 (arXiv 2303.09556, eq. 8): min(SNR, gamma)/SNR for eps, min(SNR, gamma)/(SNR+1) for v."""
    return snr_S.clamp(max=gamma) * factor_S


def soft_min_snr(snr_S: Tensor, factor_S: Tensor, gamma: float) -> Tensor:
    """gamma SNR / (SNR + gamma) on x0: Min-SNR without the corner (arXiv 2401.11605, appendix B)."""
    return snr_S * gamma / (snr_S + gamma) * factor_S


def debiased(snr_S: Tensor, factor_S: Tensor, gamma: float) -> Tensor:
    """sqrt(SNR) on x0, that is 1/sqrt(SNR) for eps (arXiv 2310.08442, eq. 13), held in [1/sqrt(1e3), sqrt(1e3)]."""
    return snr_S * snr_S.clamp(1e-3, 1e3).rsqrt() * factor_S


def weight_table(name: str, schedule: Schedule, gamma: float) -> Tensor:
    """Loss weight of every schedule step, float64 [S], finite everywhere.

    At zero SNR an eps prediction says nothing about x0 (the factor is infinite): the weight is that of the nearest
    step with SNR > 0.
    """
    factor_S = X0_ERROR[schedule.parameterization](schedule.alpha_S, schedule.sigma_S)
    weight_S = load(WEIGHTINGS[name])(schedule.snr_S, factor_S, gamma)
    finite_S = torch.isfinite(weight_S)
    nearest = int(finite_S.nonzero()[-1])
    return torch.where(finite_S, weight_S, weight_S[nearest])
