"""FLUX.1 dev, schnell and Krea-dev: CLIP's pooled text and T5's states, a transformer over 2x2 cells of latents."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.families import flow
from dbtrain.families.flux_names import kohya
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Codec, Family, Models, Tokens
from dbtrain.values import Batch, Conditioning

T5_LENGTH, SCHNELL_T5_LENGTH = 512, 256
"""Tokens of T5. Without a mask their number is a part of the function, so training has the pipeline's."""
GUIDANCE = 1.0
"""The embedded guidance of a training step. Sampling has 3.5; the model then extrapolates what it learnt at 1."""


def t5_length(models: Models) -> int:
    """Tokens of T5 for a model; schnell is known by its scheduler, which shifts nothing."""
    return T5_LENGTH if models.scheduler.config.use_dynamic_shifting else SCHNELL_T5_LENGTH


def tokenize(models: Models, captions: Sequence[str]) -> Tokens:
    """Ids for CLIP (77 tokens) and for T5 (512; 256 for schnell)."""
    clip, t5 = models.tokenizers.values()
    pairs = ((clip, clip.model_max_length), (t5, t5_length(models)))
    return tuple(flow.padded(tokenizer, list(captions), size).input_ids for tokenizer, size in pairs)


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """T5's last states [B, T, D], padding included; pooled: CLIP's state at the end of the text."""
    pooled = text_encoders["text_encoder"](tokens[0]).pooler_output
    return Conditioning(text_encoders["text_encoder_2"](tokens[1])[0], pooled)


def denoise(
    transformer: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch
) -> Tensor:
    """The transformer's velocity eps - x0 [B, C, h, w]."""
    height, width = x_t_BCHW.shape[-2:]
    states = conditioning.states_BTD
    guided = transformer.config.guidance_embeds
    prediction = transformer(
        hidden_states=flow.to_tokens(x_t_BCHW),
        timestep=time_B.to(x_t_BCHW.dtype) / 1000,
        guidance=torch.full((len(x_t_BCHW),), GUIDANCE, device=x_t_BCHW.device) if guided else None,
        pooled_projections=conditioning.pooled_BD,
        encoder_hidden_states=states,
        txt_ids=states.new_zeros(states.shape[1], 3),
        img_ids=flow.grid_ids(height // 2, width // 2, states),
        return_dict=False,
    )[0]
    return flow.from_tokens(prediction, height, width)


def call(models: Models, guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's call: the embedded guidance (there is no second pass), T5's length of training."""
    return {"guidance_scale": guidance, "max_sequence_length": t5_length(models)}


DEV = Architecture(
    "diffusers:FluxTransformer2DModel",
    {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    latent_side=128,
    channels=16,
    tokens=T5_LENGTH,
    width=4096,
    pooled=768,
)

FLUX = Family(
    name="flux",
    pipeline="FluxPipeline",
    also=("FluxKontextPipeline",),  # without a picture to edit, it is FLUX.1 dev
    denoiser="transformer",
    text_encoders=("text_encoder", "text_encoder_2"),
    components={
        "transformer": ("diffusers:FluxTransformer2DModel",),
        "vae": ("diffusers:AutoencoderKL",),
        "text_encoder": ("transformers:CLIPTextModel",),
        "text_encoder_2": ("transformers:T5EncoderModel",),
        "tokenizer_2": ("transformers:T5TokenizerFast",),
    },
    schedule=flow.schedule,
    codec=Codec(channels=16, cell=8, encode=flow.kl_moments, scale=flow.unscaled, multiple=16),
    tokenize=tokenize,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers={},
    kohya=kohya,
    regions=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    shift=flow.shift_of,
    call=call,
    avoided=flow.nothing,
    trains_text=False,
    negative=False,
    base_version="flux1",
    shapes={"flux1": DEV},
)
