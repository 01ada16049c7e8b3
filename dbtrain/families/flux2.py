"""FLUX.2 dev: klein's larger sibling. Stacked layers of Mistral as text, and an embedded guidance."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dbtrain.families import flow
from dbtrain.families.flux2_klein import FLUX2_KLEIN, LENGTH, denoise, size
from dbtrain.models.family import Family, Models, Tokens
from dbtrain.values import Conditioning

LAYERS = (10, 20, 30)
"""Hidden states of Mistral that the pipeline joins."""
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
"""The pipeline's system message, line break included."""


def tokenize(models: Models, captions: Sequence[str]) -> Tokens:
    """Ids and mask of each caption as the user's turn of a chat behind the system message."""
    (tokenizer,) = models.tokenizers.values()
    texts = [tokenizer.apply_chat_template(_chat(caption), tokenize=False) for caption in captions]
    # The template writes the first token itself, as a rule; a second one would be another text.
    special = not (tokenizer.bos_token and texts[0].startswith(tokenizer.bos_token))
    found = flow.padded(tokenizer, texts, LENGTH, add_special_tokens=special)
    return found.input_ids, found.attention_mask


def _chat(caption: str) -> list[dict]:
    # "[IMG]" would stand for a picture.
    turns = (("system", SYSTEM), ("user", caption.replace("[IMG]", "")))
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """Three hidden states side by side along D [B, T, 3D], padding included."""
    ids, mask = tokens
    encoder = text_encoders["text_encoder"]
    output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    states: list[Tensor] = [output.hidden_states[layer] for layer in LAYERS]
    return Conditioning(torch.cat(states, -1))


FLUX2 = Family(
    name="flux2",
    pipeline="Flux2Pipeline",
    denoiser="transformer",
    text_encoders=("text_encoder",),
    components={
        **FLUX2_KLEIN.components,
        "text_encoder": ("transformers:Mistral3ForConditionalGeneration",),
        "tokenizer": ("transformers:AutoTokenizer",),
    },
    schedule=flow.schedule,
    codec=FLUX2_KLEIN.codec,
    tokenize=tokenize,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers={},
    kohya=FLUX2_KLEIN.kohya,
    regions=FLUX2_KLEIN.regions,
    shift=flow.shift_of,
    call=FLUX2_KLEIN.call,  # here the guidance is embedded
    avoided=flow.nothing,
    trains_text=False,
    negative=False,
    shapes={"flux2_dev": size(8, 48, 48, 15360, guidance_embeds=True)},
)
