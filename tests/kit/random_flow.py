"""Random-weight models of the rectified-flow families, small enough for tests."""

import string
from pathlib import Path
from typing import Any

import torch

from dbtrain.tiny import BASE
from tests.kit.random_text import text_config

WORDS = "a photo of dog cat the in snow very much longer caption".split()


def t5_tokenizer() -> Any:
    """T5's kind of tokenizer over letters and some words."""
    from transformers import T5TokenizerFast

    letters = [(letter, -4.0) for letter in string.ascii_lowercase]
    words = [(f"\u2581{word}", -2.0) for word in WORDS]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -3.0), *letters, *words]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0)


def t5() -> Any:
    """A random T5 encoder of `t5_tokenizer`'s vocabulary."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=40, d_kv=8, d_ff=32, num_layers=2, num_heads=4)).eval()


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(BASE / "tokenizer")


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def dynamic_scheduler(**options: Any) -> Any:
    """A flow scheduler whose shift grows with the image, FLUX's unless told otherwise."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    flux = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, **{**flux, **options})


def make_sd3(folder: Path) -> Path:
    """A diffusers folder of a random Stable Diffusion 3.5 medium layout: its first block has a second attention."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_projection_dim=64,
        joint_attention_dim=40,
        pooled_projection_dim=48,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    tokenizer = _clip_tokenizer()
    first, second = (CLIPTextConfig(**text_config(tokenizer, width, width)) for width in (16, 32))
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=CLIPTextModelWithProjection(first),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def make_flux(folder: Path) -> Path:
    """A diffusers folder of a random FLUX.1 dev layout."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=40,
        pooled_projection_dim=48,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    tokenizer = _clip_tokenizer()
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=dynamic_scheduler(),
        vae=_vae(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(tokenizer, width=48))),
        tokenizer=tokenizer,
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def make_chroma(folder: Path) -> Path:
    """A diffusers folder of a random Chroma layout."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=40,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    pipeline = ChromaPipeline(
        transformer=transformer,
        scheduler=dynamic_scheduler(),
        vae=_vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


THINKING = (
    "{% for one in messages %}<|im_start|>{{ one.role }}\n{{ one.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""A chat template that knows thinking."""
SPOKEN = (
    "{{ bos_token }}{% for one in messages %}[{{ one.role }}]"
    "{% for part in one.content %}{{ part.text }}{% endfor %}{% endfor %}"
)
"""A chat template of turns in parts."""


def chat_tokenizer(template: str = THINKING) -> Any:
    """Qwen's kind of tokenizer over bytes and some pairs, with a chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast

    merges = [("d", "o"), ("do", "g"), ("c", "a"), ("ca", "t"), ("\u0120", "a")]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*sorted(ByteLevel.alphabet()), *(first + second for first, second in merges), *special]
    tokenizer = Qwen2TokenizerFast(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=merges,
        pad_token=special[0],
        bos_token=special[1],
        unk_token=special[0],
        eos_token=special[2],
        additional_special_tokens=special[1:],
    )
    tokenizer.chat_template = template
    return tokenizer


def _flux2_parts(guidance_embeds: bool) -> dict[str, Any]:
    """What a random FLUX.2 has besides text: its autoencoder has statistics of the latents' cells."""
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return {"transformer": transformer, "vae": vae, "scheduler": dynamic_scheduler()}


TEXT = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "head_dim": 8}
"""A small language model."""


def make_flux2_klein(folder: Path) -> Path:
    """A diffusers folder of a random FLUX.2 klein layout."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    pipeline = Flux2KleinPipeline(
        **_flux2_parts(False),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**TEXT, num_hidden_layers=28)).eval(),
        tokenizer=chat_tokenizer(),
        is_distilled=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_flux2(folder: Path) -> Path:
    """A diffusers folder of a random FLUX.2 dev layout, with a tokenizer alone: a processor would need torchvision."""
    from diffusers import Flux2Pipeline
    from tokenizers.processors import TemplateProcessing
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    parts = _flux2_parts(True)
    text = {"model_type": "mistral", **TEXT, "num_hidden_layers": 31}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    tokenizer = chat_tokenizer(SPOKEN)
    begun = ("<|im_start|>", tokenizer.bos_token_id)  # a first token of its own, as Mistral's
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begun[0]} $A", special_tokens=[begun])
    config = Mistral3Config(text_config=text, vision_config=vision)
    encoder = Mistral3ForConditionalGeneration(config).eval()
    Flux2Pipeline(**parts, text_encoder=encoder, tokenizer=tokenizer).save_pretrained(folder)
    return folder
