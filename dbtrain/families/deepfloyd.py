"""DeepFloyd IF: a cascade over pixels. Stage I draws 64 pixels from text, stage II enlarges them to 256.

Stage II is shown cat(x_t, guide): three channels of each. Its guide is the small picture of the same crop, enlarged and
noised. Training that gives it x_t in place of the guide never shows it a small picture.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.families import flow
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Codec, Family, Guide, Models, Tokens, exactly
from dbtrain.models.schedules import changed, diffusion
from dbtrain.models.unet import UNET
from dbtrain.objective.noise import Schedule
from dbtrain.settings.config import ModelConfig
from dbtrain.values import Batch, Conditioning

LENGTH = 77
"""Tokens of a caption in diffusers' pipelines."""


def tokenize(models: Models, captions: Sequence[str]) -> Tokens:
    """Ids and mask of the captions, which the pipelines turn to lower case."""
    (tokenizer,) = models.tokenizers.values()
    told = flow.padded(tokenizer, [caption.lower().strip() for caption in captions], LENGTH)
    return told.input_ids, told.attention_mask


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """The text encoder's last states [B, 77, D]. The mask counts inside the encoder alone."""
    return Conditioning(text_encoders["text_encoder"](tokens[0], attention_mask=tokens[1])[0])


def schedule(scheduler: Any, config: ModelConfig) -> tuple[Schedule, Any]:
    """The schedule of `diffusion`, and a scheduler with a fixed variance: training teaches the mean alone."""
    table, scheduler = diffusion(scheduler, config)
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        scheduler = changed(scheduler, type(scheduler), {"variance_type": "fixed_small"})
    return table, scheduler


def denoise(unet: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Stage I's prediction [B, 3, H, W]; the other half of what the U-Net says is the variance."""
    return unet(x_t_BCHW, time_B, conditioning.states_BTD, return_dict=False)[0][:, : x_t_BCHW.shape[1]]


def enlarge(unet: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Stage II's prediction [B, 3, H, W], given the guide beside x_t, and the guide's noise level."""
    assert batch.guide_BCHW is not None
    shown = torch.cat([x_t_BCHW, batch.guide_BCHW.to(x_t_BCHW.dtype)], 1)
    told = unet(shown, time_B, conditioning.states_BTD, class_labels=batch.level_B, return_dict=False)[0]
    return told[:, : x_t_BCHW.shape[1]]


def call(models: Models, guidance: float) -> dict[str, Any]:
    """Arguments of the pipelines' call. Their cleaning of captions takes out words such as identifiers."""
    return {"guidance_scale": guidance, "clean_caption": False}


def pixels(vae: None, pixels_BCHW: Tensor) -> Tensor:
    """Moments of the pixels themselves."""
    return exactly(pixels_BCHW)


_SHARED: dict[str, Any] = {
    "denoiser": "unet",
    "text_encoders": ("text_encoder",),
    "components": {
        "unet": (UNET,),
        "text_encoder": ("transformers:T5EncoderModel", "transformers:CLIPTextModel"),
        "tokenizer": ("transformers:T5TokenizerFast", "transformers:T5Tokenizer", "transformers:CLIPTokenizer"),
    },
    "absent": {
        **dict.fromkeys(("safety_checker", "feature_extractor", "watermarker")),
        "requires_safety_checker": False,
    },
    "schedule": schedule,
    "codec": Codec(channels=3, cell=1, encode=pixels, scale=flow.unscaled),
    "tokenize": tokenize,
    "encode_tokens": encode_tokens,
    "samplers": {"ddpm": "DDPMScheduler"},
    "kohya": None,
    "regions": ("ResnetBlock2D",),
    "call": call,
    "trains_text": False,
}
_BLOCKS: dict[str, Any] = {
    "out_channels": 6,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "attention_head_dim": 64,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "resnet_time_scale_shift": "scale_shift",
}
_TOLD: dict[str, Any] = {"channels": 3, "tokens": LENGTH, "width": 4096}
I_XL = Architecture(
    UNET,
    {
        **_BLOCKS,
        "sample_size": 64,
        "in_channels": 3,
        "block_out_channels": (704, 1408, 2112, 2816),
        "layers_per_block": 3,
        "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        "cross_attention_dim": 2816,
    },
    latent_side=64,
    **_TOLD,
)
II_L = Architecture(
    UNET,
    {
        **_BLOCKS,
        "sample_size": 256,
        "in_channels": 6,
        "block_out_channels": (160, 320, 640, 960, 1280),
        "layers_per_block": (2, 2, 3, 5, 5),
        "down_block_types": (*("ResnetDownsampleBlock2D",) * 3, *("SimpleCrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 2, *("ResnetUpsampleBlock2D",) * 3),
        "cross_attention_dim": 1280,
        "class_embed_type": "timestep",
        "mid_block_scale_factor": 1.4142271248762552,
        "resnet_out_scale_factor": 1.4142271248762552,
        "resnet_skip_time_act": True,
    },
    latent_side=256,
    **_TOLD,
)
"""IF-I-XL and IF-II-L, from the `config.json` of their U-Nets. The smaller models' are not known here."""

IF_STAGE1 = Family(name="if_stage1", pipeline="IFPipeline", denoise=denoise, shapes={"if_i_xl": I_XL}, **_SHARED)
IF_STAGE2 = Family(
    name="if_stage2",
    pipeline="IFSuperResolutionPipeline",
    denoise=enlarge,
    shapes={"if_ii_l": II_L},
    guide=Guide("image_noising_scheduler", enlarged=True),
    **_SHARED,
)
