"""Sana: Gemma 2 behind a long instruction as text, linear attention over latents of 32 pixels a cell."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.families import flow
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Codec, Family, Models, Tokens
from dbtrain.values import Batch, Conditioning

LENGTH = 300
"""Tokens of a caption, as in the pipeline."""


def instruction() -> str:
    """What the pipeline puts before a caption where it is called with a prompt alone."""
    from diffusers import SanaPipeline

    return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


def tokenize(models: Models, captions: Sequence[str]) -> Tokens:
    """Ids and mask of each caption in lower case behind the instruction, and the places whose states are kept: the
    first and the last ones. The empty caption, which guidance leads away from, stands alone."""
    (tokenizer,) = models.tokenizers.values()
    before = instruction()
    length = len(tokenizer.encode(before)) + LENGTH - 2
    texts = [before + caption.lower().strip() if caption else "" for caption in captions]
    found = flow.padded(tokenizer, texts, length, padding_side="right")
    last = torch.tensor([0, *range(length - LENGTH + 1, length)])
    places = [last if caption else torch.arange(LENGTH) for caption in captions]
    return found.input_ids, found.attention_mask, torch.stack(places)


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """Gemma's last states at the kept places [B, T, D], and which of them are of real tokens."""
    ids, mask, places = tokens
    states = text_encoders["text_encoder"](ids, attention_mask=mask)[0]
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return Conditioning(states[rows, places], mask_BT=mask[rows, places].bool())


def latents(vae: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """Moments of an autoencoder that draws nothing: a log-variance of minus infinity."""
    mean = vae.encode(pixels_BCHW.to(next(vae.parameters()).dtype)).latent
    return flow.fold(mean, torch.full_like(mean, -math.inf), vae.config.scaling_factor, 0.0)


def denoise(
    transformer: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch
) -> Tensor:
    """The transformer's velocity eps - x0 [B, C, h, w]."""
    return transformer(
        x_t_BCHW,
        encoder_hidden_states=conditioning.states_BTD,
        encoder_attention_mask=conditioning.mask_BT,
        timestep=time_B * transformer.config.timestep_scale,
        return_dict=False,
    )[0]


def call(models: Models, guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's call: the guidance scale (1 is none), and pictures of the size that is asked for."""
    return {"guidance_scale": guidance, "max_sequence_length": LENGTH, "use_resolution_binning": False}


def embeds(told: Conditioning) -> dict[str, Any]:
    """Encoded prompts and their mask as the pipeline takes them; it refuses its own default of a text beside them."""
    return {"prompt": None, "prompt_embeds": told.states_BTD, "prompt_attention_mask": told.mask_BT}


LARGE = Architecture(
    "diffusers:SanaTransformer2DModel",
    {"num_layers": 20, "num_attention_heads": 70, "attention_head_dim": 32, "caption_channels": 2304},
    latent_side=32,
    channels=32,
    tokens=LENGTH,
    width=2304,
)

SANA = Family(
    name="sana",
    pipeline="SanaPipeline",
    denoiser="transformer",
    text_encoders=("text_encoder",),
    components={
        "transformer": ("diffusers:SanaTransformer2DModel",),
        "vae": ("diffusers:AutoencoderDC",),
        "text_encoder": ("transformers:Gemma2Model",),
        "tokenizer": ("transformers:AutoTokenizer",),
    },
    schedule=flow.schedule,
    codec=Codec(channels=32, cell=32, encode=latents, scale=flow.unscaled, multiple=32),
    tokenize=tokenize,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers={},
    kohya=None,
    regions=("SanaTransformerBlock",),
    shift=flow.shift_of,
    call=call,
    embeds=embeds,
    trains_text=False,
    shapes={"sana_1600m": LARGE},
)
