"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net over VAE latents."""

from torch import Tensor, nn

from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Family, KohyaLayer, Tokens
from dbtrain.models.schedules import diffusion
from dbtrain.models.unet import CODEC, REGIONS, SAMPLERS, UNET, text_path
from dbtrain.values import Batch, Conditioning


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """The text encoder's last hidden state [B, T, D], after its final layer norm."""
    return Conditioning(text_encoders["text_encoder"](tokens[0])[0])


def denoise(unet: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
    """The U-Net's prediction [B, C, h, w]."""
    return unet(x_t_BCHW, time_B, conditioning.states_BTD, return_dict=False)[0]


def kohya(component: str, path: str) -> KohyaLayer:
    """kohya's name of a layer: diffusers' path with underscores, behind `lora_unet` or `lora_te`."""
    name = f"lora_unet.{path}" if component == "unet" else f"lora_te.{text_path(path)}"
    return KohyaLayer(name.replace(".", "_"))


SD15 = Architecture(
    UNET,
    {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    latent_side=64,
    channels=4,
    tokens=77,
    width=768,
)
"""Stable Diffusion 1.5 at 512 px, from the `unet/config.json` of its published repository."""

SD = Family(
    name="sd",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    text_encoders=("text_encoder",),
    components={
        "unet": (UNET,),
        "vae": ("diffusers:AutoencoderKL",),
        "text_encoder": ("transformers:CLIPTextModel",),
    },
    absent={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    schedule=diffusion,
    codec=CODEC,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers=SAMPLERS,
    kohya=kohya,
    regions=REGIONS,
    shapes={"sd15": SD15},
    base_version="sd_v1",
)
