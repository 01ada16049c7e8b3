"""What a model's diffusers scheduler says: the noise schedule for training, and the scheduler to sample with."""

import inspect
from typing import Any

from dbtrain.errors import ConfigError
from dbtrain.objective.noise import Schedule, discrete_schedule
from dbtrain.settings.config import ModelConfig


def diffusion(scheduler: Any, config: ModelConfig) -> tuple[Schedule, Any]:
    """The training schedule of a DDPM-like scheduler, and the sampling scheduler that agrees with it."""
    if config.parameterization == "flow":
        raise ConfigError("model.parameterization: flow is for flow models alone; use epsilon, v_prediction or sample")
    schedule = schedule_of(scheduler, config)
    return schedule, scheduler_as_trained(scheduler, schedule, config)


def schedule_of(scheduler: Any, config: ModelConfig) -> Schedule:
    """The training schedule in a diffusers scheduler's configuration."""
    from diffusers import DDPMScheduler

    kept = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    kept["rescale_betas_zero_snr"] = False
    parameterization = (
        kept.get("prediction_type", "epsilon") if config.parameterization == "auto" else config.parameterization
    )
    rescale = scheduler.config.get("rescale_betas_zero_snr", False)
    if config.zero_terminal_snr != "auto":
        rescale = config.zero_terminal_snr
    if rescale and parameterization == "epsilon":
        raise ConfigError(
            "model.zero_terminal_snr: an epsilon model learns nothing at zero SNR; "
            "set model.parameterization=v_prediction or model.zero_terminal_snr=false"
        )
    return discrete_schedule(DDPMScheduler.from_config(kept).alphas_cumprod, parameterization, bool(rescale))


def scheduler_as_trained(scheduler: Any, schedule: Schedule, config: ModelConfig) -> Any:
    """The sampling scheduler that agrees with the training schedule: the model's own, unless settings override it.

    Zero terminal SNR is sampled with trailing steps, from pure noise on (arXiv 2305.08891, section 3.3).
    """
    told: dict[str, Any] = {}
    if config.parameterization != "auto":
        told["prediction_type"] = schedule.parameterization
    if config.zero_terminal_snr != "auto":
        told["rescale_betas_zero_snr"] = config.zero_terminal_snr
    if config.zero_terminal_snr is True:
        told["timestep_spacing"] = "trailing"
    if not told:
        return scheduler
    from diffusers import DDIMScheduler

    knows_zero_snr = "rescale_betas_zero_snr" in inspect.signature(type(scheduler)).parameters
    kind = type(scheduler) if knows_zero_snr or config.zero_terminal_snr is not True else DDIMScheduler
    return changed(scheduler, kind, told)


def changed(scheduler: Any, kind: Any, settings: dict[str, Any]) -> Any:
    """A scheduler of this class with another one's settings, but for these.

    diffusers keeps in `_use_default_values` what a file did not say, and `from_config` drops those keys; without that
    list it takes them.
    """
    kept = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return kind.from_config({**kept, **settings})
