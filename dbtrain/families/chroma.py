"""Chroma: FLUX.1's blocks with modulation from one small network, and T5 alone as text."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.families import flow
from dbtrain.families.flux_names import kohya
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Codec, Family, Models, Tokens
from dbtrain.values import Batch, Conditioning

LENGTH = 512
"""Tokens of T5. The pipeline's mask leaves padding visible (see `weighed`), so training has as many as sampling."""


def tokenize(models: Models, captions: Sequence[str]) -> Tokens:
    """Ids and mask for T5."""
    (tokenizer,) = models.tokenizers.values()
    found = flow.padded(tokenizer, list(captions), LENGTH)
    return found.input_ids, found.attention_mask


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """T5's last states [B, T, D]. mask_BT: the caption's tokens and one of padding."""
    ids, mask = tokens
    states = text_encoders["text_encoder"](ids, attention_mask=mask)[0]
    places = torch.arange(mask.shape[1], device=mask.device)
    return Conditioning(states, mask_BT=places <= mask.sum(1, keepdim=True))


def weighed(conditioning: Conditioning) -> Tensor:
    """The mask as diffusers' pipeline has it: 1 and 0 as numbers, which attention adds to its scores. Captions then
    count e times as much as padding; nothing is hidden."""
    mask_BT = conditioning.mask_BT
    assert mask_BT is not None
    return mask_BT.to(conditioning.states_BTD.dtype)


def denoise(
    transformer: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch
) -> Tensor:
    """The transformer's velocity eps - x0 [B, C, h, w]."""
    height, width = x_t_BCHW.shape[-2:]
    states, images = conditioning.states_BTD, flow.to_tokens(x_t_BCHW)
    mask_BT = weighed(conditioning)
    prediction = transformer(
        hidden_states=images,
        timestep=time_B.to(x_t_BCHW.dtype) / 1000,
        encoder_hidden_states=states,
        txt_ids=states.new_zeros(states.shape[1], 3),
        img_ids=flow.grid_ids(height // 2, width // 2, states),
        attention_mask=torch.cat([mask_BT, mask_BT.new_ones(images.shape[:2])], 1),
        return_dict=False,
    )[0]
    return flow.from_tokens(prediction, height, width)


REGIONS = ("ChromaTransformerBlock", "ChromaSingleTransformerBlock")


def recompute(transformer: nn.Module, checkpoint: Callable[..., Any]) -> None:
    """Let every block be computed again in backward. Where diffusers does it (0.42), single blocks get no mask."""
    for block in transformer.modules():
        if type(block).__name__ in REGIONS and "forward" not in vars(block):
            vars(block)["forward"] = partial(checkpoint, block.forward)


def embeds(told: Conditioning) -> dict[str, Any]:
    """Encoded prompts and their mask as the pipeline takes them."""
    return {"prompt_embeds": told.states_BTD, "prompt_attention_mask": weighed(told)}


HD = Architecture(
    "diffusers:ChromaTransformer2DModel",
    {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24},
    latent_side=128,
    channels=16,
    tokens=LENGTH,
    width=4096,
)

CHROMA = Family(
    name="chroma",
    pipeline="ChromaPipeline",
    denoiser="transformer",
    text_encoders=("text_encoder",),
    components={
        "transformer": ("diffusers:ChromaTransformer2DModel",),
        "vae": ("diffusers:AutoencoderKL",),
        "text_encoder": ("transformers:T5EncoderModel",),
        "tokenizer": ("transformers:T5TokenizerFast",),
    },
    absent={"image_encoder": None, "feature_extractor": None},
    schedule=flow.schedule,
    codec=Codec(channels=16, cell=8, encode=flow.kl_moments, scale=flow.unscaled, multiple=16),
    tokenize=tokenize,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers={},
    kohya=kohya,
    regions=REGIONS,
    shift=flow.shift_of,
    call=partial(flow.call, LENGTH),
    embeds=embeds,
    recompute=recompute,
    trains_text=False,
    shapes={"chroma": HD},
)
