"""A family of made-up functions, over U-Net latents of four channels."""

from dbtrain.models.family import Family
from dbtrain.models.schedules import diffusion
from dbtrain.models.unet import CODEC, SAMPLERS


def fake_family(encode_tokens, denoise, text_encoders=()) -> Family:
    """A row whose text and denoiser are the given functions."""
    return Family(
        name="fake",
        pipeline="",
        denoiser="unet",
        text_encoders=text_encoders,
        components={},
        schedule=diffusion,
        codec=CODEC,
        encode_tokens=encode_tokens,
        denoise=denoise,
        samplers=SAMPLERS,
        kohya=None,
        regions=(),
        shapes={},
    )
