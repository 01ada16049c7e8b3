"""Playground v2.5 (arXiv 2402.17245): Stable Diffusion XL's layout, trained in EDM's form (arXiv 2206.00364).

EDM has x = x0 + sigma eps, a U-Net F told 0.25 ln sigma and shown c_in x, and D = c_skip x + c_out F for the clean
image x0, whose deviation is `DATA`. Over y = x0 / DATA, with alpha = DATA / sqrt(sigma^2 + DATA^2) and s the same with
sigma on top, that is c_in x = alpha y + s eps, and F learns s y - alpha eps: a velocity with the other sign. So the
table of noise levels, one division and one sign are all that differs. The plain loss is EDM's own, weighed by
1 / c_out^2 (eq. 8).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.errors import ConfigError
from dbtrain.families import flow, sdxl
from dbtrain.models.family import Codec
from dbtrain.objective.noise import Schedule
from dbtrain.settings.config import ModelConfig
from dbtrain.values import Batch, Conditioning

DATA = 0.5
"""The deviation of latents, `sigma_data` of the model's scheduler."""


def schedule(scheduler: Any, config: ModelConfig) -> tuple[Schedule, Any]:
    """The noise levels of EDM's scheduler, from the least noisy on, and that scheduler."""
    from diffusers import EDMEulerScheduler

    told = scheduler.config
    if "EDM" not in type(scheduler).__name__ or told.get("sigma_data") != DATA:
        name = type(scheduler).__name__
        raise ConfigError(f"model.path: its scheduler is a {name}, want EDM's with sigma_data {DATA}")
    if told.get("prediction_type") != "epsilon" or config.parameterization not in ("auto", "v_prediction"):
        raise ConfigError("model.parameterization: playground has EDM's form alone; set it to auto")
    if config.zero_terminal_snr is True:
        raise ConfigError("model.zero_terminal_snr: EDM's noise levels end where they end; leave the setting out")
    kept = {key: value for key, value in told.items() if not key.startswith("_")}
    sigma_S = EDMEulerScheduler.from_config(kept).sigmas[: told["num_train_timesteps"]].flip(0).double()
    whole_S = (sigma_S**2 + DATA**2).sqrt()
    return Schedule(DATA / whole_S, sigma_S / whole_S, sigma_S.log() / 4, "v_prediction"), scheduler


def encode(vae: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """Moments of y, by a mean and a deviation for each channel."""
    posterior = vae.encode(pixels_BCHW.to(next(vae.parameters()).dtype)).latent_dist
    mean, deviation = (
        torch.tensor(values).view(-1, 1, 1).to(posterior.mean)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return flow.fold(posterior.mean, posterior.logvar, vae.config.scaling_factor / deviation / DATA, mean)


def denoise(unet: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
    """The velocity alpha eps - s y [B, C, h, w]; the U-Net says the opposite."""
    return -sdxl.denoise(unet, x_t_BCHW, time_B, conditioning, batch)


PLAYGROUND = replace(
    sdxl.SDXL,
    name="playground",
    schedule=schedule,
    codec=Codec(channels=4, cell=8, encode=encode, scale=flow.unscaled),
    denoise=denoise,
    samplers={},
    edm=True,
    shapes={"playground_v25": sdxl.XL},
    base_version="unknown",
)
