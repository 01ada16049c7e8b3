"""Layers of FLUX.1 and FLUX.2 in kohya's files, which have Black Forest Labs' names: q, k, v are one layer there."""

import re

from dbtrain.errors import ConfigError
from dbtrain.models.family import KohyaLayer

QKV = (1, 1, 1)
LINEAR1 = (1, 1, 1, 4)
"""q, k, v and the first layer of the MLP, four times as wide."""
DOUBLE = {
    "attn.to_q": KohyaLayer("img_attn_qkv", 0, QKV),
    "attn.to_k": KohyaLayer("img_attn_qkv", 1, QKV),
    "attn.to_v": KohyaLayer("img_attn_qkv", 2, QKV),
    "attn.to_out.0": KohyaLayer("img_attn_proj"),
    "attn.add_q_proj": KohyaLayer("txt_attn_qkv", 0, QKV),
    "attn.add_k_proj": KohyaLayer("txt_attn_qkv", 1, QKV),
    "attn.add_v_proj": KohyaLayer("txt_attn_qkv", 2, QKV),
    "attn.to_add_out": KohyaLayer("txt_attn_proj"),
    "ff.net.0.proj": KohyaLayer("img_mlp_0"),
    "ff.net.2": KohyaLayer("img_mlp_2"),
    "ff_context.net.0.proj": KohyaLayer("txt_mlp_0"),
    "ff_context.net.2": KohyaLayer("txt_mlp_2"),
    "ff.linear_in": KohyaLayer("img_mlp_0"),
    "ff.linear_out": KohyaLayer("img_mlp_2"),
    "ff_context.linear_in": KohyaLayer("txt_mlp_0"),
    "ff_context.linear_out": KohyaLayer("txt_mlp_2"),
    "norm1.linear": KohyaLayer("img_mod_lin"),
    "norm1_context.linear": KohyaLayer("txt_mod_lin"),
}
SINGLE = {
    "attn.to_q": KohyaLayer("linear1", 0, LINEAR1),
    "attn.to_k": KohyaLayer("linear1", 1, LINEAR1),
    "attn.to_v": KohyaLayer("linear1", 2, LINEAR1),
    "proj_mlp": KohyaLayer("linear1", 3, LINEAR1),
    "proj_out": KohyaLayer("linear2"),
    "attn.to_qkv_mlp_proj": KohyaLayer("linear1"),
    "attn.to_out": KohyaLayer("linear2"),
    "norm.linear": KohyaLayer("modulation_lin"),
}
BLOCKS = {"transformer_blocks": ("double_blocks", DOUBLE), "single_transformer_blocks": ("single_blocks", SINGLE)}


def kohya(component: str, path: str) -> KohyaLayer:
    """A block's layer in kohya's files, behind `lora_unet`; ConfigError for a layer outside the blocks."""
    found = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", path)
    kind, layers = BLOCKS.get(found[1] if found else "", ("", {}))
    if not found or found[3] not in layers:
        raise ConfigError(f"publish.kohya: {component}.{path} has no name in kohya's files; drop it of lora.targets")
    layer = layers[found[3]]
    return layer._replace(name=f"lora_unet_{kind}_{found[2]}_{layer.name}")
