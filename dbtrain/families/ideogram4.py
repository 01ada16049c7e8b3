"""Ideogram 4: thirteen layers of Qwen3-VL as text, one stream of caption and image, a second transformer for guidance.

Guidance leads away from what a transformer of its own says without text. That one is loaded to draw pictures, and never
trains. The authors publish weights in few bits alone; dbtrain reads whole ones.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbtrain.families import flow
from dbtrain.families.flux2_klein import FLUX2_KLEIN
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Codec, Family, Models, Tokens
from dbtrain.models.texts import Texts
from dbtrain.values import Batch, Conditioning

LENGTH = 1024
"""Most tokens of a caption, which is JSON as a rule; the pipeline's 2048 would take 436 MB for each caption."""
TEXT, IMAGE, PADDING, FIRST = 3, 2, -1, 65536
"""How the transformer is told tokens of text, of the image, and padding; the first place of an image token."""


def tokenize(models: Models, captions: Sequence[str]) -> Tokens:
    """Ids and mask of each caption as the user's turn of a chat."""
    (tokenizer,) = models.tokenizers.values()
    turns = [[{"role": "user", "content": [{"type": "text", "text": caption}]}] for caption in captions]
    texts = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    found = flow.padded(tokenizer, texts, LENGTH, padding_side="right", add_special_tokens=False)
    return found.input_ids, found.attention_mask


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """Thirteen hidden states of each token, number by number [B, T, 13 D], and which tokens are real."""
    from diffusers import Ideogram4Pipeline

    ids, mask = tokens
    tapped = Ideogram4Pipeline._get_text_encoder_hidden_states(  # diffusers 0.42: what its `encode_prompt` calls
        text_encoders["text_encoder"], ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
    )
    states = torch.stack(tapped, -1).flatten(2) * mask[..., None].to(tapped[0].dtype)
    return Conditioning(states, mask_BT=mask.bool())


def denoise(
    transformer: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch
) -> Tensor:
    """The velocity eps - x0 [B, C, h, w]. The transformer is told 1 - sigma, and says the opposite, x0 - eps."""
    count, channels, height, width = x_t_BCHW.shape
    states, mask = conditioning.states_BTD.to(x_t_BCHW.dtype), conditioning.mask_BT
    assert mask is not None
    length, seen = states.shape[1], mask.new_ones(count, height * width)
    places = (mask.cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, 3)
    image = (flow.grid_ids(height, width, places) + FIRST).expand(count, -1, -1)
    prediction = transformer(
        hidden_states=torch.cat([x_t_BCHW.new_zeros(count, length, channels), x_t_BCHW.flatten(2).mT], 1),
        timestep=(1 - time_B / 1000).to(x_t_BCHW.dtype),
        encoder_hidden_states=F.pad(states, (0, 0, 0, height * width)),
        position_ids=torch.cat([places, image], 1),
        segment_ids=torch.where(torch.cat([mask, seen], 1), 1, PADDING),
        indicator=torch.cat([mask * TEXT, seen * IMAGE], 1),
        return_dict=False,
    )[0]
    return -prediction[:, length:].mT.reshape(x_t_BCHW.shape)


def hear(pipeline: Any, texts: Texts) -> None:
    """Let a pipeline that takes prompts alone find them encoded. It has padding before the text."""

    def encode_prompt(prompt: list[str], grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> tuple:
        told = texts.each(prompt, str(device))
        assert told.mask_BT is not None
        lengths = told.mask_BT.sum(1).tolist()
        rows = [row.roll(LENGTH - length, 0) for row, length in zip(told.states_BTD.float(), lengths)]
        layout = pipeline._prepare_ids(lengths, grid_h, grid_w, max_sequence_length, device)
        return F.pad(torch.stack(rows), (0, 0, 0, grid_h * grid_w)), *layout

    pipeline.encode_prompt = encode_prompt


def moments(vae: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """FLUX.2's moments in the order (dy, dx, c) of a cell's numbers, with statistics in that order too."""
    mean = vae.encode(pixels_BCHW.to(next(vae.parameters()).dtype)).latent_dist.mean
    cells = F.pixel_unshuffle(mean, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)
    m = vae.bn.running_mean.view(-1, 1, 1).to(cells)
    s = (vae.bn.running_var.view(-1, 1, 1) + vae.config.batch_norm_eps).sqrt().to(cells)
    return flow.fold(cells, torch.full_like(cells, -torch.inf), 1 / s, m)


def shift(scheduler: Any, tokens: int) -> float:
    """exp(mu), mu being half the logarithm of the pixels over 512^2, as in sampling; a token has 16^2 pixels."""
    return math.sqrt(tokens) * 16 / 512


def call(models: Models, guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's call: one guidance for all steps; 1 is none."""
    return {"guidance_scale": guidance, "guidance_schedule": None, "max_sequence_length": LENGTH}


IDEOGRAM4 = Family(
    name="ideogram4",
    pipeline="Ideogram4Pipeline",
    denoiser="transformer",
    companions=("unconditional_transformer",),
    text_encoders=("text_encoder",),
    components={
        "transformer": ("diffusers:Ideogram4Transformer2DModel",),
        "unconditional_transformer": ("diffusers:Ideogram4Transformer2DModel",),
        "vae": FLUX2_KLEIN.components["vae"],
        "text_encoder": ("transformers:Qwen3VLModel",),
        "tokenizer": ("transformers:AutoTokenizer",),
    },
    schedule=flow.schedule,
    codec=Codec(channels=128, cell=16, encode=moments, scale=flow.unscaled, multiple=16),
    tokenize=tokenize,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers={},
    kohya=None,
    regions=("Ideogram4TransformerBlock",),
    shift=shift,
    call=call,
    avoided=flow.nothing,
    hear=hear,
    trains_text=False,
    negative=False,
    shapes={
        "ideogram4": Architecture(
            "diffusers:Ideogram4Transformer2DModel", {}, latent_side=64, channels=128, tokens=LENGTH, width=53248
        )
    },
)
