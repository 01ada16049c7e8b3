"""Krea 2: twelve layers of Qwen3-VL side by side as text, one stream of caption and image."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.errors import ConfigError
from dbtrain.families import flow
from dbtrain.families.qwen_image import ANSWER, INSTRUCTION, INSTRUCTION_TOKENS
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Codec, Family, Models, Tokens
from dbtrain.values import Batch, Conditioning

LENGTH, ANSWER_TOKENS = 512, 5
"""Tokens of the text that the transformer sees, and those of the answer's beginning at their end."""
LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""Hidden states of Qwen3-VL that the pipeline stacks."""


def tokenize(models: Models, captions: Sequence[str]) -> Tokens:
    """Ids and mask of [instruction, caption, padding, answer's beginning], the pipeline's fixed block."""
    told = models.told.get("text_encoder_select_layers") or LAYERS
    if tuple(told) != LAYERS:
        raise ConfigError(f"model.path: taps the layers {list(told)} of its text encoder, want {list(LAYERS)}")
    (tokenizer,) = models.tokenizers.values()
    texts = [INSTRUCTION + caption for caption in captions]
    begun = flow.padded(tokenizer, texts, INSTRUCTION_TOKENS + LENGTH - ANSWER_TOKENS)
    ended = tokenizer([ANSWER] * len(texts), return_tensors="pt")
    return tuple(torch.cat([begun[name], ended[name]], 1) for name in ("input_ids", "attention_mask"))


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """Twelve hidden states behind the instruction, side by side [B, T, 12 D], and their mask."""
    ids, mask = tokens
    # Padding lies before the answer, and does not count as a position.
    places = (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    output = text_encoders["text_encoder"](
        input_ids=ids, attention_mask=mask.bool(), position_ids=places, output_hidden_states=True
    )
    states = torch.stack([output.hidden_states[layer] for layer in LAYERS], 2)[:, INSTRUCTION_TOKENS:]
    return Conditioning(states.flatten(2), mask_BT=mask[:, INSTRUCTION_TOKENS:].bool())


def denoise(
    transformer: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch
) -> Tensor:
    """The transformer's velocity eps - x0 [B, C, h, w]."""
    height, width = x_t_BCHW.shape[-2:]
    states = conditioning.states_BTD
    like = states.new_empty(0, dtype=torch.float32)
    ids = [like.new_zeros(states.shape[1], 3), flow.grid_ids(height // 2, width // 2, like)]
    prediction = transformer(
        hidden_states=flow.to_tokens(x_t_BCHW),
        timestep=(time_B / 1000).to(x_t_BCHW.dtype),
        encoder_hidden_states=states.unflatten(2, (len(LAYERS), -1)),
        encoder_attention_mask=conditioning.mask_BT,
        position_ids=torch.cat(ids),
        return_dict=False,
    )[0]
    return flow.from_tokens(prediction, height, width)


def embeds(told: Conditioning) -> dict[str, Any]:
    """Encoded prompts as the pipeline takes them: its layers in an axis of their own."""
    states = told.states_BTD.unflatten(2, (len(LAYERS), -1))
    return {"prompt_embeds": states, "prompt_embeds_mask": told.mask_BT}


RAW = Architecture(
    "diffusers:Krea2Transformer2DModel",
    {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 48, "num_key_value_heads": 12},
    latent_side=128,
    channels=16,
    tokens=LENGTH,
    width=len(LAYERS) * 2560,
)

KREA2 = Family(
    name="krea2",
    pipeline="Krea2Pipeline",
    denoiser="transformer",
    text_encoders=("text_encoder",),
    components={
        "transformer": ("diffusers:Krea2Transformer2DModel",),
        "vae": ("diffusers:AutoencoderKLQwenImage",),
        "text_encoder": ("transformers:Qwen3VLModel",),
        "tokenizer": ("transformers:Qwen2TokenizerFast",),
    },
    told=("is_distilled", "text_encoder_select_layers", "patch_size"),
    schedule=flow.schedule,
    codec=Codec(channels=16, cell=8, encode=flow.channel_moments, scale=flow.unscaled, multiple=16),
    tokenize=tokenize,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers={},
    kohya=None,
    regions=("Krea2TransformerBlock",),
    shift=flow.shift_of,
    call=partial(flow.call_added, LENGTH),
    embeds=embeds,
    trains_text=False,
    shapes={"krea2": RAW},
)
