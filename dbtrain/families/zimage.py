"""Z-Image: Qwen3's next-to-last states of a caption's real tokens, one stream of caption and image."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.families import flow
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Codec, Family, KohyaLayer, Models, Tokens
from dbtrain.values import Batch, Conditioning

LENGTH = 512
"""Most tokens of a caption, as in the pipeline. The number of real ones moves the image's positions."""


def tokenize(models: Models, captions: Sequence[str]) -> Tokens:
    """Ids and mask of each caption as the user's turn of a chat, with thinking."""
    return flow.chat_tokens(models, captions, LENGTH, thinking=True)


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """Qwen3's next-to-last states [B, T, D], and which of them are of real tokens."""
    ids, mask = tokens
    output = text_encoders["text_encoder"](input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return Conditioning(output.hidden_states[-2], mask_BT=mask.bool())


def ragged(conditioning: Conditioning) -> list[Tensor]:
    """The states of each caption's real tokens alone [T_b, D]."""
    mask_BT = conditioning.mask_BT
    assert mask_BT is not None
    return [states[mask] for states, mask in zip(conditioning.states_BTD, mask_BT)]


def denoise(
    transformer: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch
) -> Tensor:
    """The velocity eps - x0 [B, C, h, w]. The transformer is told 1 - sigma, and says the opposite, x0 - eps."""
    time_B = (1000 - time_B) / 1000
    images = list(x_t_BCHW.unsqueeze(2).unbind(0))
    prediction = transformer(images, time_B, ragged(conditioning), return_dict=False)[0]
    return -torch.stack(prediction).squeeze(2)


def embeds(told: Conditioning) -> dict[str, Any]:
    """Encoded prompts as the pipeline takes them."""
    return {"prompt_embeds": ragged(told)}


def kohya(component: str, path: str) -> KohyaLayer:
    """A layer's name in kohya's files: the original model's own, where q, k and v are one layer. ComfyUI knows no other
    behind `lora_unet`, and diffusers reads it."""
    block, _, layer = path.rpartition(".attention.to_")
    name = f"lora_unet_{block}_attention".replace(".", "_")
    if layer in ("q", "k", "v"):
        return KohyaLayer(f"{name}_qkv", "qkv".index(layer), (1, 1, 1))
    return KohyaLayer(f"{name}_out") if layer == "out.0" else flow.underscored(component, path)


BASE = Architecture(
    "diffusers:ZImageTransformer2DModel",
    {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560},
    latent_side=128,
    channels=16,
    tokens=128,
    width=2560,
)

ZIMAGE = Family(
    name="zimage",
    pipeline="ZImagePipeline",
    denoiser="transformer",
    text_encoders=("text_encoder",),
    components={
        "transformer": ("diffusers:ZImageTransformer2DModel",),
        "vae": ("diffusers:AutoencoderKL",),
        "text_encoder": ("transformers:Qwen3Model", "transformers:Qwen3ForCausalLM"),
        "tokenizer": ("transformers:Qwen2TokenizerFast",),
    },
    schedule=flow.schedule,
    codec=Codec(channels=16, cell=8, encode=flow.kl_means, scale=flow.unscaled, multiple=16),
    tokenize=tokenize,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers={},
    kohya=kohya,
    regions=("ZImageTransformerBlock",),
    shift=flow.shift_of,
    call=partial(flow.call_added, LENGTH),
    embeds=embeds,
    trains_text=False,
    unstackable={"cap_embedder.1": "it reads the captions of all samples as one sequence"},
    shapes={"zimage": BASE},
)
