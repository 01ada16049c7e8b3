"""Published shapes of base models, to count and to time without their weights. The families' rows hold them."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from dbtrain.engines.unit_scale import drop_unit_divisions
from dbtrain.errors import ConfigError
from dbtrain.models.attention import xformers_problem


@dataclass(frozen=True)
class Architecture:
    """A denoiser's class (`library:Class`) and configuration, the latents and captions that it takes in training, and
    their sizes. pooled: features of the pooled text embedding; None where there is none."""

    denoiser: str
    config: dict[str, Any]
    latent_side: int
    channels: int
    tokens: int
    width: int
    pooled: int | None = None

    def blank(self, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """A frozen denoiser of this shape: random weights, or shapes alone on the `meta` device."""
        with torch.device(device):
            denoiser = class_of(self.denoiser)(**self.config)
        drop_unit_divisions(denoiser)
        return denoiser.to(dtype).requires_grad_(False)


def class_of(name: str) -> Any:
    """The class that `library:Class` names.

    Raises ConfigError where xformers is installed and does not load: diffusers imports it with each of its models.
    """
    library, _, attribute = name.partition(":")
    if library == "diffusers" and find_spec("xformers") and (problem := xformers_problem()):
        raise ConfigError(f"diffusers cannot load its models here, whatever model.attention says: {problem}")
    return getattr(import_module(library), attribute)
