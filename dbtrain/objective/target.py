"""What the denoiser is asked to predict, y, for each parameterization."""

from collections.abc import Callable

from torch import Tensor

TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda clean, noise, alpha, sigma: noise,  # DDPM, arXiv 2006.11239, eq. 14
    "v_prediction": lambda clean, noise, alpha, sigma: alpha * noise - sigma * clean,  # arXiv 2202.00512, eq. in sec. 4
    "sample": lambda clean, noise, alpha, sigma: clean,
    "flow": lambda clean, noise, alpha, sigma: noise - clean,  # arXiv 2403.03206, eq. 13
}
"""Target y of (clean x, noise eps, alpha, sigma), all broadcastable to [B, ...]."""
