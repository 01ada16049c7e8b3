"""Model families. The only door to diffusers and transformers; `FAMILIES` has a row for each architecture."""

from dbtrain.families.family import Family, Models, encode_images, sample_latents
from dbtrain.families.load import load_models, load_tokenizer
from dbtrain.families.sd import SD
from dbtrain.families.sdxl import SDXL

FAMILIES: dict[str, Family] = {family.name: family for family in (SD, SDXL)}
"""Every architecture by the name used in `model.family`."""

__all__ = ["FAMILIES", "Family", "Models", "encode_images", "load_models", "load_tokenizer", "sample_latents"]
