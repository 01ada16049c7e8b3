"""Noise schedules: the tables alpha and sigma of x_t = alpha_t x + sigma_t eps."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """A noise schedule as tables over S steps, from the least noisy to the noisiest.

    alpha_S, sigma_S: float64 signal and noise scales. time_S: what the denoiser is told.
    parameterization: what the denoiser predicts: epsilon, v_prediction, sample or flow.
    """

    alpha_S: Tensor
    sigma_S: Tensor
    time_S: Tensor
    parameterization: str

    @property
    def snr_S(self) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 of each step."""
        return (self.alpha_S / self.sigma_S) ** 2

    def to(self, device: torch.device) -> "Schedule":
        """The same schedule with its tables on a device."""
        return Schedule(self.alpha_S.to(device), self.sigma_S.to(device), self.time_S.to(device), self.parameterization)


def discrete_schedule(alpha_bar_S: Tensor, parameterization: str, zero_terminal_snr: bool = False) -> Schedule:
    """The variance-preserving schedule of DDPM (arXiv 2006.11239), from alpha_bar = prod(1 - beta) = alpha^2."""
    alpha_S = alpha_bar_S.double().sqrt()
    if zero_terminal_snr:
        alpha_S = rescale_to_zero_terminal_snr(alpha_S)
    return Schedule(alpha_S, (1 - alpha_S**2).sqrt(), torch.arange(len(alpha_S)), parameterization)


def rescale_to_zero_terminal_snr(alpha_S: Tensor) -> Tensor:
    """Signal scales shifted and stretched so that the last is 0 and the first stays (arXiv 2305.08891, algorithm 1)."""
    first, last = alpha_S[0], alpha_S[-1]
    return (alpha_S - last) * first / (first - last)


def flow_schedule(steps: int = 1000, shift: float = 1.0) -> Schedule:
    """The straight path x_t = (1 - sigma) x + sigma eps of rectified flow (arXiv 2403.03206, eq. 23 for `shift`)."""
    sigma_S = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    sigma_S = shift * sigma_S / (1 + (shift - 1) * sigma_S)
    return Schedule(1 - sigma_S, sigma_S, sigma_S * steps, "flow")
