"""Model families. The only door to diffusers and transformers; `FAMILIES` has a row for each architecture."""

from dbtrain.families.sd import SD
from dbtrain.families.sdxl import SDXL
from dbtrain.models.family import Family, Models, encode_images, sample_latents
from dbtrain.models.load import load_models, load_tokenizer

FAMILIES: dict[str, Family] = {family.name: family for family in (SD, SDXL)}
"""Every architecture by the name used in `model.family`."""

__all__ = ["FAMILIES", "Family", "Models", "encode_images", "load_models", "load_tokenizer", "sample_latents"]
