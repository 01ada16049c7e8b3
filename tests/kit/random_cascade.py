"""Random-weight models of the cascades, small enough for tests: DeepFloyd IF's two stages and the x4 upscaler."""

from pathlib import Path
from typing import Any

import torch

from dbtrain.tiny import BASE
from tests.kit.random_flow import t5, t5_tokenizer
from tests.kit.random_text import text_config

NOTHING: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "watermarker": None,
    "requires_safety_checker": False,
}


def _pixel_unet(inputs: int, layers: int, **more: Any) -> Any:
    """A U-Net in IF's layout: simple cross-attention with added keys, and a learned variance beside the mean."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16 if inputs == 3 else 64,
        in_channels=inputs,
        out_channels=6,
        block_out_channels=(8, 16),
        layers_per_block=layers,
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        encoder_hid_dim=40,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        resnet_skip_time_act=True,
        act_fn="gelu",
        time_embedding_act_fn="gelu",
        only_cross_attention=False,
        **more,
    )


def _cosine(**more: Any) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", **more)


def _pixel_scheduler(maximum: float) -> Any:
    return _cosine(
        variance_type="learned_range", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=maximum
    )


def make_if_stage1(folder: Path) -> Path:
    """A diffusers folder of DeepFloyd IF stage I's layout."""
    from diffusers import IFPipeline

    torch.manual_seed(0)
    parts = {"tokenizer": t5_tokenizer(), "text_encoder": t5(), "scheduler": _pixel_scheduler(1.5)}
    IFPipeline(unet=_pixel_unet(3, 1), **parts, **NOTHING).save_pretrained(folder)
    return folder


def make_if_stage2(folder: Path) -> Path:
    """A diffusers folder of DeepFloyd IF stage II's layout: its U-Net takes x_t and the guide, and is told a level."""
    from diffusers import IFSuperResolutionPipeline

    torch.manual_seed(0)
    pipeline = IFSuperResolutionPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        unet=_pixel_unet(6, 1, class_embed_type="timestep"),
        scheduler=_pixel_scheduler(1.0),
        image_noising_scheduler=_cosine(),
        **NOTHING,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_x4_upscaler(folder: Path) -> Path:
    """A diffusers folder of the x4 upscaler's layout: an autoencoder of factor 4, v-prediction, 1000 noise levels."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        StableDiffusionUpscalePipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=7,
        out_channels=4,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        only_cross_attention=(True, True, False),
        cross_attention_dim=32,
        attention_head_dim=4,
        use_linear_projection=True,
        num_class_embeds=1000,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.08333,
    )
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    pipeline = StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(tokenizer))),
        tokenizer=tokenizer,
        unet=unet,
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02),
        scheduler=DDIMScheduler(
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=True,
            prediction_type="v_prediction",
        ),
        max_noise_level=350,
    )
    pipeline.save_pretrained(folder)
    return folder
