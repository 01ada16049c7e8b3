"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIP text encoders and T5, a joint-attention transformer."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbtrain.families import flow
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Codec, Family, Models, Tokens
from dbtrain.values import Batch, Conditioning

T5_LENGTH = 256
"""Tokens of T5 in diffusers' pipeline. Without a mask their number is a part of the function, so training has them."""


def tokenize(models: Models, captions: Sequence[str]) -> Tokens:
    """Ids for CLIP L and G (77 tokens) and for T5 (256 tokens)."""
    first, second, t5 = models.tokenizers.values()
    pairs = ((first, first.model_max_length), (second, first.model_max_length), (t5, T5_LENGTH))
    return tuple(flow.padded(tokenizer, list(captions), length).input_ids for tokenizer, length in pairs)


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """Penultimate states of CLIP L and G side by side, padded with zeros to T5's width; then T5's last states. Pooled:
    both projected embeddings."""
    names = ("text_encoder", "text_encoder_2")
    outputs = [text_encoders[name](ids, output_hidden_states=True) for name, ids in zip(names, tokens)]
    clip = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    pooled = torch.cat([output.text_embeds for output in outputs], -1)
    t5 = text_encoders["text_encoder_3"](tokens[2])[0]
    return Conditioning(torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], 1), pooled)


def denoise(
    transformer: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch
) -> Tensor:
    """The transformer's velocity eps - x0 [B, C, h, w]."""
    return transformer(
        hidden_states=x_t_BCHW,
        timestep=time_B,
        encoder_hidden_states=conditioning.states_BTD,
        pooled_projections=conditioning.pooled_BD,
        return_dict=False,
    )[0]


LARGE = Architecture(
    "diffusers:SD3Transformer2DModel",
    {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 38,
        "attention_head_dim": 64,
        "num_attention_heads": 38,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 2432,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    latent_side=128,
    channels=16,
    tokens=77 + T5_LENGTH,
    width=4096,
    pooled=2048,
)
MEDIUM = Architecture(
    "diffusers:SD3Transformer2DModel",
    {
        **LARGE.config,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    latent_side=128,
    channels=16,
    tokens=77 + T5_LENGTH,
    width=4096,
    pooled=2048,
)

SD3 = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    denoiser="transformer",
    text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    components={
        "transformer": ("diffusers:SD3Transformer2DModel",),
        "vae": ("diffusers:AutoencoderKL",),
        "text_encoder": ("transformers:CLIPTextModelWithProjection",),
        "text_encoder_2": ("transformers:CLIPTextModelWithProjection",),
        "text_encoder_3": ("transformers:T5EncoderModel",),
        "tokenizer_3": ("transformers:T5TokenizerFast",),
    },
    schedule=flow.schedule,
    codec=Codec(channels=16, cell=8, encode=flow.kl_moments, scale=flow.unscaled, multiple=16),
    tokenize=tokenize,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers={},
    kohya=None,
    regions=("JointTransformerBlock",),
    shift=flow.shift_of,
    call=partial(flow.call, T5_LENGTH),
    trains_text=False,
    shapes={"sd35_large": LARGE, "sd35_medium": MEDIUM},
)
