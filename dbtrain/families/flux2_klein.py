"""FLUX.2 klein 4B and 9B: stacked layers of Qwen3 as text, a transformer over normalized cells of latents."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dbtrain.families import flow
from dbtrain.families.flux_names import kohya
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Codec, Family, Models, Tokens
from dbtrain.values import Batch, Conditioning

LENGTH = 512
"""Tokens of a caption. The transformer sees the padding too, so training has as many as the pipeline."""
GUIDANCE = 1.0
"""The embedded guidance of dev's training step. Sampling has 4; the model then extrapolates what it learnt at 1."""
LAYERS = (9, 18, 27)
"""Hidden states of Qwen3 that the pipeline joins."""


def tokenize(models: Models, captions: Sequence[str]) -> Tokens:
    """Ids and mask of each caption as the user's turn of a chat, without thinking."""
    return flow.chat_tokens(models, captions, LENGTH, thinking=False)


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """Three hidden states side by side along D [B, T, 3D], padding included."""
    ids, mask = tokens
    encoder = text_encoders["text_encoder"]
    output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return Conditioning(torch.cat([output.hidden_states[layer] for layer in LAYERS], -1))


def moments(vae: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """Cells of 2x2 latents as channels (c, dy, dx), normalized by the autoencoder's statistics.

    The mean alone, as diffusers' scripts have it: a log-variance of minus infinity draws exactly the mean.
    """
    mean = vae.encode(pixels_BCHW.to(next(vae.parameters()).dtype)).latent_dist.mean
    cells = nn.functional.pixel_unshuffle(mean, 2)
    m = vae.bn.running_mean.view(-1, 1, 1).to(cells)
    s = (vae.bn.running_var.view(-1, 1, 1) + vae.config.batch_norm_eps).sqrt().to(cells)
    return flow.fold(cells, torch.full_like(cells, -torch.inf), 1 / s, m)


def denoise(
    transformer: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch
) -> Tensor:
    """The transformer's velocity eps - x0 [B, C, h, w]."""
    count, _, height, width = x_t_BCHW.shape
    states, guided = conditioning.states_BTD, transformer.config.guidance_embeds
    # Coordinates (time, row, column, place in the text) of each token.
    text_ids = torch.zeros(count, states.shape[1], 4, dtype=torch.long, device=states.device)
    text_ids[..., 3] = torch.arange(states.shape[1], device=states.device)
    image_ids = nn.functional.pad(flow.grid_ids(height, width, text_ids), (0, 1)).expand(count, -1, -1)
    prediction = transformer(
        hidden_states=x_t_BCHW.flatten(2).mT,
        timestep=time_B.to(x_t_BCHW.dtype) / 1000,
        guidance=torch.full((count,), GUIDANCE, device=states.device) if guided else None,
        encoder_hidden_states=states,
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]
    return prediction.mT.reshape(x_t_BCHW.shape)


def size(blocks: int, single_blocks: int, heads: int, width: int, guidance_embeds: bool = False) -> Architecture:
    """A published size at 1024 px."""
    config = {
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": blocks,
        "num_single_layers": single_blocks,
        "attention_head_dim": 128,
        "num_attention_heads": heads,
        "joint_attention_dim": width,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (32, 32, 32, 32),
        "guidance_embeds": guidance_embeds,
    }
    return Architecture(
        "diffusers:Flux2Transformer2DModel", config, latent_side=64, channels=128, tokens=LENGTH, width=width
    )


FLUX2_KLEIN = Family(
    name="flux2_klein",
    pipeline="Flux2KleinPipeline",
    denoiser="transformer",
    text_encoders=("text_encoder",),
    components={
        "transformer": ("diffusers:Flux2Transformer2DModel",),
        "vae": ("diffusers:AutoencoderKLFlux2",),
        "text_encoder": ("transformers:Qwen3ForCausalLM",),
        "tokenizer": ("transformers:Qwen2TokenizerFast",),
    },
    told=("is_distilled",),
    schedule=flow.schedule,
    codec=Codec(channels=128, cell=16, encode=moments, scale=flow.unscaled, multiple=16),
    tokenize=tokenize,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers={},
    kohya=kohya,
    regions=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    shift=flow.shift_of,
    call=partial(flow.call, LENGTH),
    trains_text=False,
    negative=False,
    shapes={"flux2_klein_4b": size(5, 20, 24, 7680), "flux2_klein_9b": size(8, 24, 32, 12288)},
)
