"""Lumina-Image 2.0: Gemma 2's next-to-last states behind a system prompt, one stream of caption and image."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from dbtrain.families import flow
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Codec, Family, Models, Tokens
from dbtrain.values import Batch, Conditioning

LENGTH = 256
"""Most tokens of a caption with its system prompt, as in the pipeline."""
SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)
"""What the pipeline puts before a caption; what guidance leads away from has nothing before it."""


def tokenize(models: Models, captions: Sequence[str]) -> Tokens:
    """Ids and mask of each caption behind the system prompt; the empty caption stands alone."""
    (tokenizer,) = models.tokenizers.values()
    texts = [SYSTEM + caption if caption else "" for caption in captions]
    found = flow.padded(tokenizer, texts, LENGTH, padding_side="right")
    return found.input_ids, found.attention_mask


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """Gemma's next-to-last states [B, T, D], and which of them are of real tokens."""
    ids, mask = tokens
    output = text_encoders["text_encoder"](ids, attention_mask=mask, output_hidden_states=True)
    return Conditioning(output.hidden_states[-2], mask_BT=mask.bool())


def denoise(
    transformer: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch
) -> Tensor:
    """The velocity eps - x0 [B, C, h, w]. The transformer is told 1 - sigma, and says the opposite, x0 - eps."""
    return -transformer(
        hidden_states=x_t_BCHW,
        timestep=1 - time_B / 1000,
        encoder_hidden_states=conditioning.states_BTD,
        encoder_attention_mask=conditioning.mask_BT,
        return_dict=False,
    )[0]


def embeds(told: Conditioning) -> dict[str, Any]:
    """Encoded prompts and their mask as the pipeline takes them."""
    return {"prompt_embeds": told.states_BTD, "prompt_attention_mask": told.mask_BT}


IMAGE = Architecture(
    "diffusers:Lumina2Transformer2DModel",
    {"hidden_size": 2304, "num_layers": 26, "num_attention_heads": 24, "num_kv_heads": 8, "cap_feat_dim": 2304},
    latent_side=128,
    channels=16,
    tokens=LENGTH,
    width=2304,
)

LUMINA2 = Family(
    name="lumina2",
    pipeline="Lumina2Pipeline",
    denoiser="transformer",
    text_encoders=("text_encoder",),
    components={
        "transformer": ("diffusers:Lumina2Transformer2DModel",),
        "vae": ("diffusers:AutoencoderKL",),
        "text_encoder": ("transformers:Gemma2Model",),
        "tokenizer": ("transformers:AutoTokenizer",),
    },
    schedule=flow.schedule,
    codec=Codec(channels=16, cell=8, encode=flow.kl_moments, scale=flow.unscaled, multiple=16),
    tokenize=tokenize,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers={},
    kohya=None,
    regions=("Lumina2TransformerBlock",),
    shift=flow.shift_of,
    call=partial(flow.call, LENGTH),
    embeds=embeds,
    trains_text=False,
    shapes={"lumina2": IMAGE},
)
