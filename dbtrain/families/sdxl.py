"""Stable Diffusion XL (arXiv 2307.01952): two text encoders, pooled text and size conditioning."""

import torch
from torch import Tensor, nn

from dbtrain.models.family import Family, Tokens
from dbtrain.values import Batch, Conditioning


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """Both encoders' penultimate hidden states, joined along D, and the second one's projected pooled embedding."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(text_encoders.values(), tokens)]
    states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return Conditioning(states, outputs[-1].text_embeds)


def denoise(unet: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch) -> Tensor:
    """The U-Net's prediction [B, C, h, w], told each sample's original size, crop and target size."""
    added = {"text_embeds": conditioning.pooled_BD, "time_ids": batch.size_B6}
    return unet(x_t_BCHW, time_B, conditioning.states_BTD, added_cond_kwargs=added, return_dict=False)[0]


SDXL = Family("sdxl", "StableDiffusionXLPipeline", "unet", ("text_encoder", "text_encoder_2"), encode_tokens, denoise)
