"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net over VAE latents."""

from torch import Tensor, nn

from dbtrain.models.family import Family, Tokens
from dbtrain.values import Batch, Conditioning


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """The text encoder's last hidden state [B, T, D], after its final layer norm."""
    return Conditioning(text_encoders["text_encoder"](tokens[0])[0])


def denoise(unet: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
    """The U-Net's prediction [B, C, h, w]."""
    return unet(x_t_BCHW, time_B, conditioning.states_BTD, return_dict=False)[0]


SD = Family("sd", "StableDiffusionPipeline", "unet", ("text_encoder",), encode_tokens, denoise)
