"""Random-weight models of the real architectures, small enough for tests: what every family's code path runs on."""

import shutil
from pathlib import Path

import torch

from dbtrain.tiny import BASE, CLIP
from tests.kit.random_cascade import make_if_stage1, make_if_stage2, make_x4_upscaler
from tests.kit.random_chat import (
    make_ideogram4,
    make_krea2,
    make_lumina2,
    make_qwen_image,
    make_sana,
    make_zimage,
)
from tests.kit.random_flow import make_chroma, make_flux, make_flux2, make_flux2_klein, make_sd3
from tests.kit.random_text import text_config


def _vae(**options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **options,
    )


def _scheduler(parameterization: str):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=parameterization,
    )


def make_sd(folder: Path, parameterization: str = "epsilon") -> Path:
    """A diffusers folder of a random Stable Diffusion 1.x layout."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(tokenizer))),
        unet=unet,
        tokenizer=tokenizer,
        scheduler=_scheduler(parameterization),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_playground(folder: Path) -> Path:
    """A diffusers folder of a random Playground v2.5: Stable Diffusion XL's layout in EDM's form."""
    from diffusers import EDMDPMSolverMultistepScheduler

    statistics = {"latents_mean": (-1.6, 1.1, 2.3, -0.7), "latents_std": (8.4, 5.9, 5.2, 6.6), "scaling_factor": 0.5}
    return make_sdxl(folder, _vae(**statistics), EDMDPMSolverMultistepScheduler())


def make_sdxl(folder: Path, vae=None, scheduler=None) -> Path:
    """A diffusers folder of a random Stable Diffusion XL layout."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=80,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 6 * 8,
    )
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    pipeline = StableDiffusionXLPipeline(
        vae=vae or _vae(),
        unet=unet,
        scheduler=scheduler or _scheduler("epsilon"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(tokenizer))),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text_config(tokenizer, projection=48, width=48))),
        force_zeros_for_empty_prompt=True,
    )
    pipeline.save_pretrained(folder)
    shutil.rmtree(folder / "feature_extractor", ignore_errors=True)
    return folder


FAMILIES = {
    "sd": make_sd,
    "sdxl": make_sdxl,
    "playground": make_playground,
    "sd3": make_sd3,
    "flux": make_flux,
    "flux2_klein": make_flux2_klein,
    "flux2": make_flux2,
    "zimage": make_zimage,
    "qwen_image": make_qwen_image,
    "krea2": make_krea2,
    "if_stage1": make_if_stage1,
    "if_stage2": make_if_stage2,
    "x4_upscaler": make_x4_upscaler,
    "chroma": make_chroma,
    "lumina2": make_lumina2,
    "sana": make_sana,
    "ideogram4": make_ideogram4,
}
"""What writes the diffusers folder of a random model, by the name of its family."""


def random_weights(cls, config, **options):
    """A model with small random weights, skipping the library's slow initializers."""
    with torch.device("meta"):
        model = cls(config, **options)
    model = model.to_empty(device="cpu").eval()
    stream = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.detach().normal_(0, 0.02, generator=stream)
    for name, value in model.named_buffers():
        assert name.endswith("position_ids")
        value.copy_(torch.arange(value.numel()).view_as(value))
    return model


def make_vit_s16(folder: Path) -> Path:
    """A transformers folder of a random ViT-S/16 with DINO's preprocessing."""
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = ViTConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6)
    random_weights(ViTModel, config, add_pooling_layer=False).to(torch.float16).save_pretrained(folder)
    ViTImageProcessorPil(resample=3).save_pretrained(folder)
    return folder


def make_clip_b32(folder: Path) -> Path:
    """A transformers folder of a random CLIP ViT-B/32; fp16 on disk, half of 600 MB. Its tokenizer is a smaller one."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    # openai/clip-vit-base-patch32; its vocabulary is not at hand, its table's size is kept.
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=special, vision_config={"patch_size": 32}, projection_dim=512)
    random_weights(CLIPModel, config).to(torch.float16).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
