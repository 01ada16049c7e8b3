"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, pooled text and size conditioning."""

import torch
from torch import Tensor, nn

from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Family, KohyaLayer, Tokens
from dbtrain.models.schedules import diffusion
from dbtrain.models.stability_names import to_stability
from dbtrain.models.unet import CODEC, REGIONS, SAMPLERS, UNET, text_path
from dbtrain.values import Batch, Conditioning


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """Both encoders' penultimate hidden states, joined along D, and the second one's projected pooled embedding."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(text_encoders.values(), tokens)]
    states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return Conditioning(states, outputs[-1].text_embeds)


def denoise(unet: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
    """The U-Net's prediction [B, C, h, w], given each sample's original size, crop and target size."""
    added = {"text_embeds": conditioning.pooled_BD, "time_ids": batch.size_B6}
    return unet(x_t_BCHW, time_B, conditioning.states_BTD, added_cond_kwargs=added, return_dict=False)[0]


KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def kohya(component: str, path: str) -> KohyaLayer:
    """kohya's name of a layer: Stability's block names with underscores, behind `lora_unet`, `lora_te1`, `lora_te2`."""
    name = f"{KOHYA[component]}.{to_stability(path) if component == 'unet' else text_path(path)}"
    return KohyaLayer(name.replace(".", "_"))


XL = Architecture(
    UNET,
    {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    latent_side=128,
    channels=4,
    tokens=77,
    width=2048,
    pooled=1280,
)
"""Stable Diffusion XL at 1024 px, from the `unet/config.json` of its published repository."""

SDXL = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    denoiser="unet",
    text_encoders=("text_encoder", "text_encoder_2"),
    components={
        "unet": (UNET,),
        "vae": ("diffusers:AutoencoderKL",),
        "text_encoder": ("transformers:CLIPTextModel",),
        "text_encoder_2": ("transformers:CLIPTextModelWithProjection",),
    },
    schedule=diffusion,
    codec=CODEC,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers=SAMPLERS,
    kohya=kohya,
    regions=REGIONS,
    shapes={"sdxl": XL},
    base_version="sdxl_base_v1-0",
    frees_text=False,  # its pooled text has other last bits where a prompt is encoded alone
)
