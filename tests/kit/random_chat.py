"""Random-weight models of the flow families that read text by a language model, small enough for tests."""

from pathlib import Path
from typing import Any

import torch

from tests.kit.random_flow import SPOKEN, _flux2_parts, _vae, chat_tokenizer, dynamic_scheduler


def _qwen_config(**options: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return {"vocab_size": 512, "head_dim": 8, **sizes, **options}


def film_vae() -> Any:
    """A random autoencoder of Qwen-Image's layout, with statistics of its channels."""
    from diffusers import AutoencoderKLQwenImage

    mean, deviation = torch.randn(16).tolist(), (torch.rand(16) + 0.5).tolist()
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=mean, latents_std=deviation
    )


def make_zimage(folder: Path) -> Path:
    """A diffusers folder of a random Z-Image layout."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[640, 64, 64],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.normal_()  # diffusers leaves them as they come
    pipeline = ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_vae(),
        text_encoder=Qwen3Model(Qwen3Config(**_qwen_config(num_hidden_layers=3))).eval(),
        tokenizer=chat_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def _qwen_vl_vision() -> dict[str, Any]:
    return {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}


def make_qwen_image(folder: Path) -> Path:
    """A diffusers folder of a random Qwen-Image layout."""
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    text = {**_qwen_config(num_hidden_layers=2), "rope_parameters": rope}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**_qwen_vl_vision(), "fullatt_block_indexes": [0]})
    pipeline = QwenImagePipeline(
        transformer=transformer,
        scheduler=dynamic_scheduler(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=film_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=chat_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def make_krea2(folder: Path) -> Path:
    """A diffusers folder of a random Krea 2 layout."""
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLModel

    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=12,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    text = {**_qwen_config(num_hidden_layers=36), "rope_parameters": rope}
    vision = {**_qwen_vl_vision(), "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    pipeline = Krea2Pipeline(
        transformer=transformer,
        scheduler=dynamic_scheduler(max_image_seq_len=6400),
        vae=film_vae(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval(),
        tokenizer=chat_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def make_ideogram4(folder: Path) -> Path:
    """A diffusers folder of a random Ideogram 4 layout."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLModel

    sizes = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "intermediate_size": 96}
    sizes |= {"adaln_dim": 32, "llm_features_dim": 13 * 16, "mrope_section": (4, 2, 2)}
    vae = _flux2_parts(False)["vae"]  # seeds the generator
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    text = {**_qwen_config(num_hidden_layers=36), "rope_parameters": rope}
    vision = {**_qwen_vl_vision(), "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    pipeline = Ideogram4Pipeline(
        transformer=Ideogram4Transformer2DModel(**sizes),
        unconditional_transformer=Ideogram4Transformer2DModel(**sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval(),
        tokenizer=chat_tokenizer(SPOKEN),
    )
    pipeline.save_pretrained(folder)
    return folder


def _gemma() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**_qwen_config(num_hidden_layers=2, query_pre_attn_scalar=8))).eval()


def make_lumina2(folder: Path) -> Path:
    """A diffusers folder of a random Lumina-Image 2.0 layout."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 64, 64),
        cap_feat_dim=16,
    )
    pipeline = Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_vae(),
        text_encoder=_gemma(),
        tokenizer=chat_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def make_sana(folder: Path) -> Path:
    """A diffusers folder of a random Sana layout; its cells have 16 pixels a side in place of 32."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=16,
    )
    kinds, widths, layers = ("ResBlock",) * 5, (32,) * 5, (1,) * 5
    vae = AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * 5,
        decoder_qkv_multiscales=((),) * 5,
        scaling_factor=0.41407,
    )
    pipeline = SanaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=_gemma(),
        tokenizer=chat_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder
