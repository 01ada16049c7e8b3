"""Qwen-Image and Qwen-Image-2512: Qwen2.5-VL's last states behind an instruction, a joint-attention transformer."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dbtrain.families import flow
from dbtrain.models.architectures import Architecture
from dbtrain.models.family import Codec, Family, Models, Tokens
from dbtrain.values import Batch, Conditioning

LENGTH = 512
"""Most tokens of a caption, as in the pipeline."""

INSTRUCTION = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
"""What Qwen-Image's and Krea 2's pipelines put before a caption."""
INSTRUCTION_TOKENS = 34
"""Its tokens for Qwen's tokenizers; the denoiser does not see their states."""
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
"""What these pipelines put behind a caption."""


def tokenize(models: Models, captions: Sequence[str]) -> Tokens:
    """Ids and mask of each caption within the pipeline's instruction."""
    (tokenizer,) = models.tokenizers.values()
    texts = [f"{INSTRUCTION}{caption}{ANSWER}" for caption in captions]
    found = flow.padded(tokenizer, texts, INSTRUCTION_TOKENS + LENGTH, padding_side="right")
    return found.input_ids, found.attention_mask


def encode_tokens(text_encoders: dict[str, nn.Module], tokens: Tokens) -> Conditioning:
    """The last states behind the instruction [B, T, D], zero where the caption is padded, and their mask."""
    ids, mask = tokens
    output = text_encoders["text_encoder"](input_ids=ids, attention_mask=mask, output_hidden_states=True)
    states, mask_BT = output.hidden_states[-1][:, INSTRUCTION_TOKENS:], mask[:, INSTRUCTION_TOKENS:].bool()
    return Conditioning(states.masked_fill(~mask_BT[..., None], 0), mask_BT=mask_BT)


def denoise(
    transformer: nn.Module, x_t_BCHW: Tensor, time_B: Tensor, conditioning: Conditioning, batch: Batch
) -> Tensor:
    """The transformer's velocity eps - x0 [B, C, h, w]."""
    height, width = x_t_BCHW.shape[-2:]
    prediction = transformer(
        hidden_states=flow.to_tokens(x_t_BCHW),
        timestep=time_B.to(x_t_BCHW.dtype) / 1000,
        guidance=None,
        encoder_hidden_states=conditioning.states_BTD,
        encoder_hidden_states_mask=conditioning.mask_BT,
        img_shapes=[[(1, height // 2, width // 2)]] * len(x_t_BCHW),
        return_dict=False,
    )[0]
    return flow.from_tokens(prediction, height, width)


def call(models: Models, guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's call: its guidance has another name, and as many tokens as in training."""
    return {"true_cfg_scale": guidance, "max_sequence_length": LENGTH}


def avoided(models: Models, guidance: float) -> str | None:
    """A blank, without which the pipeline would leave guidance out."""
    return " " if guidance > 1 else None


def embeds(told: Conditioning) -> dict[str, Any]:
    """Encoded prompts and their mask as the pipeline takes them."""
    return {"prompt_embeds": told.states_BTD, "prompt_embeds_mask": told.mask_BT}


IMAGE = Architecture(
    "diffusers:QwenImageTransformer2DModel",
    {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": (16, 56, 56),
    },
    latent_side=128,
    channels=16,
    tokens=LENGTH,
    width=3584,
)

QWEN_IMAGE = Family(
    name="qwen_image",
    pipeline="QwenImagePipeline",
    denoiser="transformer",
    text_encoders=("text_encoder",),
    components={
        "transformer": ("diffusers:QwenImageTransformer2DModel",),
        "vae": ("diffusers:AutoencoderKLQwenImage",),
        "text_encoder": ("transformers:Qwen2_5_VLForConditionalGeneration",),
        "tokenizer": ("transformers:Qwen2TokenizerFast",),
    },
    schedule=flow.schedule,
    codec=Codec(channels=16, cell=8, encode=flow.channel_moments, scale=flow.unscaled, multiple=16),
    tokenize=tokenize,
    encode_tokens=encode_tokens,
    denoise=denoise,
    samplers={},
    kohya=flow.underscored,
    regions=("QwenImageTransformerBlock",),
    shift=flow.shift_of,
    call=call,
    embeds=embeds,
    avoided=avoided,
    trains_text=False,
    shapes={"qwen_image": IMAGE},
)
