"""The factors of the one equation: L = sum_b W_b * mean|f(x_t, t, c)_b - y_b|^2. Pure functions of tensors.

The formulas that train are in `dbtrain_kernels/reference.py`; the modules here make tables for them. This file only
names what can be chosen, as `module:function` that is loaded on use, so that settings read the names without PyTorch.
"""

from collections.abc import Callable
from pkgutil import resolve_name

PARAMETERIZATIONS = ("epsilon", "v_prediction", "sample", "flow")
"""What a denoiser can predict: the rows of `dbtrain_kernels.reference.TARGETS` and of `weighting.X0_ERROR`."""

WEIGHTINGS = {
    "none": "weighting:none",
    "min_snr": "weighting:min_snr",
    "soft_min_snr": "weighting:soft_min_snr",
    "debiased": "weighting:debiased",
}
"""Weight [S] of (SNR [S], x0 error factor [S], gamma)."""

DISTRIBUTIONS = {
    "uniform": "timesteps:uniform",
    "logit_normal": "timesteps:logit_normal",
    "stratified": None,
}
"""Relative noise level in [0, 1) of (uniform numbers, `ObjectiveConfig`); 0 is the cleanest step of the schedule.

None: t depends on more than one uniform number, and `dbtrain_kernels.reference.timesteps` draws it.
"""


def load(name: str) -> Callable:
    """The function of `module:function`."""
    return resolve_name(f"{__name__}.{name}")
