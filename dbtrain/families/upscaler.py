"""Stable Diffusion's x4 upscaler: a U-Net over latents that is shown the small picture on the latents' own grid."""

import torch
from torch import Tensor, nn

from dbtrain.families.sd import encode_tokens
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Codec, Family, Guide, encode_images
from dbtrain.models.schedules import diffusion
from dbtrain.models.unet import REGIONS, SAMPLERS, UNET
from dbtrain.values import Batch, Conditioning

SCALE = 0.08333
"""Factor of the latents. The pipeline writes it over what the autoencoder's configuration says."""


def denoise(unet: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
    """The U-Net's prediction [B, 4, h, w], given the small picture beside x_t, and its noise level."""
    assert batch.guide_BCHW is not None
    shown = torch.cat([x_t_BCHW, batch.guide_BCHW.to(x_t_BCHW.dtype)], 1)
    return unet(shown, time_B, conditioning.states_BTD, class_labels=batch.level_B, return_dict=False)[0]


def scale(vae: nn.Module) -> tuple[float, float]:
    """(scale, shift) of the latents."""
    return SCALE, 0.0


X4 = Architecture(
    UNET,
    {
        "sample_size": 128,
        "in_channels": 7,
        "out_channels": 4,
        "block_out_channels": (256, 512, 512, 1024),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        "only_cross_attention": (True, True, True, False),
        "cross_attention_dim": 1024,
        "attention_head_dim": 8,
        "use_linear_projection": True,
        "num_class_embeds": 1000,
    },
    latent_side=128,
    channels=4,
    tokens=77,
    width=1024,
)
"""The x4 upscaler, trained at 512 px from 128 px."""

X4_UPSCALER = Family(
    name="x4_upscaler",
    pipeline="StableDiffusionUpscalePipeline",
    denoiser="unet",
    text_encoders=("text_encoder",),
    components={
        "unet": (UNET,),
        "vae": ("diffusers:AutoencoderKL",),
        "text_encoder": ("transformers:CLIPTextModel",),
    },
    absent={"safety_checker": None, "feature_extractor": None, "watermarker": None},
    told=("max_noise_level",),
    schedule=diffusion,
    codec=Codec(channels=4, cell=4, encode=encode_images, scale=scale, multiple=16),
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers=SAMPLERS,
    kohya=None,
    regions=REGIONS,
    shapes={"x4_upscaler": X4},
    guide=Guide("low_res_scheduler", enlarged=False),
)
