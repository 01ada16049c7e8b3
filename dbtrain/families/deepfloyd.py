"""DeepFloyd IF: a cascade over pixels. Stage I draws 64 pixels from text, stage II enlarges them to 256.

Stage II is shown cat(x_t, guide): three channels of each. Its guide is the small picture of the same crop, enlarged and
noised. Training that gives it x_t in place of the guide never shows it a small picture.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.families import flow
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
    "shapes": {},
}
IF_STAGE1 = Family(name="if_stage1", pipeline="IFPipeline", denoise=denoise, **_SHARED)
IF_STAGE2 = Family(
    name="if_stage2",
    pipeline="IFSuperResolutionPipeline",
    denoise=enlarge,
    guide=Guide("image_noising_scheduler", enlarged=True),
    **_SHARED,
)
