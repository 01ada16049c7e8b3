"""Layers of FLUX.1 and FLUX.2 in the files of kohya and ComfyUI, under Black Forest Labs' names: q, k, v are one layer
there."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dbtrain.errors import ConfigError, DataError, named
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


NAME = re.compile(
    r"(?:lora_unet_|diffusion_model\.|base_model\.model\.)?(double|single)_blocks[._](\d+)[._](.+?)"
    r"\.(lora_down\.weight|lora_up\.weight|lora_A(?:\.\w+)?\.weight|lora_B(?:\.\w+)?\.weight|alpha)"
)
"""A tensor of an adapter: kind of block, its number, the layer, what the tensor is."""
WIDTHS = {"qkv": (3, 1), "mlp_0": (4, 1), "mlp_2": (1, 4), "linear1": (7, 1), "linear2": (1, 5)}
"""Outputs and inputs of FLUX.1's layers, as multiples, by the ends of their names; FLUX.2's MLPs have others."""
FLUX2 = ("linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out")
"""Ends of the paths that FLUX.2 has in place of FLUX.1's for layers of the same name."""


def with_diffusers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's file with the layers of FLUX under diffusers' names, each with its own matrices; all other tensors
    as they are. Shapes tell FLUX.1 and FLUX.2 apart. Raises DataError for layers of neither."""
    kept: dict[str, Tensor] = {}
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, tensor in state.items():
        match = NAME.fullmatch(name)
        if match is None:
            kept[name] = tensor
            continue
        kind, number, layer, what = match.groups()
        place = kind, number, layer.replace(".", "_")
        end = "alpha" if what == "alpha" else "down" if what.startswith(("lora_down", "lora_A")) else "up"
        found.setdefault(place, {"name": name})[end] = tensor
    for place, tensors in found.items():
        kept |= {f"transformer.{name}": tensor for name, tensor in _parts(*place, tensors)}
    return kept


def _parts(kind: str, number: str, layer: str, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the layers of diffusers that are one layer here."""
    blocks, rows = next((name, rows) for name, (own, rows) in BLOCKS.items() if own == f"{kind}_blocks")
    down, up = tensors.get("down"), tensors.get("up")
    second = down is not None and up is not None and not _fits(layer, down, up)
    own = {path: row for path, row in rows.items() if row.name == layer}
    own = {path: row for path, row in own.items() if path.endswith(FLUX2) == second}
    if not own or (second and down.dim() != 2):
        raise DataError(
            f"{named(tensors['name'])}: is no layer of FLUX; other transformers are read in diffusers' names"
        )
    paths, sizes = {row.place: path for path, row in own.items()}, next(iter(own.values())).sizes
    if down is None or up is None:  # the reader says what is missing
        yield from ((f"{blocks}.{number}.{paths[0]}.{end}", tensors[key])
                    for key, end in (("down", "lora_A.weight"), ("up", "lora_B.weight")) if key in tensors)  # fmt: skip
        return
    unit, rank = len(up) // sum(sizes or (1,)), len(down)
    for place, part in enumerate(up.split([unit * size for size in sizes or (1,)])):
        # Files with one adapter for each part hold blocks of zeros, which are no part of its rank.
        used = part.ne(0).any(0) if sizes and up.any() else torch.ones(rank, dtype=torch.bool)
        if used.any():
            path = f"{blocks}.{number}.{paths[place]}"
            yield f"{path}.lora_A.weight", down[used]
            yield f"{path}.lora_B.weight", part[:, used]
            yield f"{path}.alpha", tensors.get("alpha", torch.tensor(float(rank))) * (int(used.sum()) / rank)


def _fits(layer: str, down: Tensor, up: Tensor) -> bool:
    """Whether matrices have the shape of a layer of FLUX.1."""
    outputs, inputs = next((widths for end, widths in WIDTHS.items() if layer.endswith(end)), (None, None))
    flat = down.dim() == up.dim() == 2
    return flat and (outputs is None or len(up) * inputs == down.shape[1] * outputs)
