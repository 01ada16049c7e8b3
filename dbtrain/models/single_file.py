"""A diffusers folder of Stable Diffusion as the tensors of one checkpoint file, under Stability's names.

ComfyUI and A1111 read whole models from such files, diffusers by `from_single_file`. Stability's layouts: the U-Net
under `model.diffusion_model.`, the VAE under `first_stage_model.`, and text encoders as transformers' CLIP or as
OpenCLIP, whose query, key and value stand in one matrix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbtrain.errors import ConfigError
from dbtrain.models.adapters import TEXT_MODEL
from dbtrain.models.stability_names import to_stability

SD2_WIDTH = 1024
"""Width of the text encoder of Stable Diffusion 2.x, which is an OpenCLIP."""
MARKS = {"v_pred": "predicts v", "ztsnr": "has zero terminal SNR"}
"""Names of empty tensors by which a file says what its scheduler would (ComfyUI and A1111 read them)."""

VAE_NAMES = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"(attn_1\.)group_norm", r"\1norm"),
    (r"(attn_1\.)to_([qkv])", r"\1\2"),
    (r"(attn_1\.)to_out\.0", r"\1proj_out"),
)
"""From diffusers' names in a VAE to Stability's; up blocks are numbered from the other end besides."""
CLIP_NAMES = (
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.", "ln_final."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
)
"""From transformers' names in a CLIP text model to OpenCLIP's."""


def checkpoint_of(folder: Path, family: str) -> dict[str, Tensor]:
    """The tensors of a model folder of this family. Raises ConfigError for a family without a common single file."""
    if family not in ("sd", "sdxl"):
        raise ConfigError(
            f"export: {family} has no single file that other programs agree on; give them the folder {folder}"
        )
    tensors = _unet(folder / "unet") | _vae(folder / "vae")
    first = _long_names(_weights(folder / "text_encoder"))
    if family == "sdxl":
        tensors |= _under("conditioner.embedders.0.transformer.", first)
        tensors |= _under("conditioner.embedders.1.model.", open_clip(_weights(folder / "text_encoder_2")))
    elif _config(folder / "text_encoder")["hidden_size"] == SD2_WIDTH:
        tensors |= _under("cond_stage_model.model.", open_clip(first))
    else:
        tensors |= _under("cond_stage_model.transformer.", first)
    return tensors | _marks(_config(folder / "scheduler", "scheduler_config.json"))


def _marks(scheduler: dict[str, Any]) -> dict[str, Tensor]:
    predicts_v = scheduler.get("prediction_type") == "v_prediction"
    held = {"v_pred": predicts_v, "ztsnr": scheduler.get("rescale_betas_zero_snr")}
    return {name: torch.zeros(0) for name, holds in held.items() if holds}


def _unet(folder: Path) -> dict[str, Tensor]:
    config = _config(folder)
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise ConfigError(f"export: {folder} has blocks of {layers} layers; no single file holds such a U-Net")
    attentive = frozenset(i for i, kind in enumerate(config["up_block_types"]) if "Attn" in kind)

    def rename(name: str) -> str:
        path, _, last = name.rpartition(".")
        try:
            return f"{to_stability(path, layers, attentive)}.{last}"
        except KeyError:
            raise ConfigError(f"export: {folder}: {name} has no place in Stability's layout") from None

    return _under("model.diffusion_model.", _renamed(_weights(folder), rename))


def _vae(folder: Path) -> dict[str, Tensor]:
    last = len(_config(folder)["block_out_channels"]) - 1
    tensors = {}
    for name, tensor in _weights(folder).items():
        new = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{last - int(found[1])}", name)
        for ours, theirs in VAE_NAMES:
            new = re.sub(ours, theirs, new)
        is_convolution = ".attn_1." in new and new.endswith("weight") and ".norm." not in new
        tensors[new] = tensor[:, :, None, None] if is_convolution and tensor.dim() == 2 else tensor
    return _under("first_stage_model.", tensors)


def open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text model of transformers under OpenCLIP's names."""
    tensors = {}
    for name, tensor in weights.items():
        joined = re.fullmatch(r"(.+)\.self_attn\.q_proj\.(weight|bias)", name)
        if name.endswith("text_projection.weight"):
            tensors["text_projection"] = tensor.T.contiguous()
        elif joined:
            parts = [weights[f"{joined[1]}.self_attn.{part}_proj.{joined[2]}"] for part in "qkv"]
            tensors[f"{_open_clip_name(joined[1])}.attn.in_proj_{joined[2]}"] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            tensors[_open_clip_name(name)] = tensor
    return tensors


def _open_clip_name(name: str) -> str:
    for ours, theirs in CLIP_NAMES:
        name = re.sub(ours, theirs, name)
    return name


def _long_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return _renamed(weights, lambda name: name if name.startswith(TEXT_MODEL) else TEXT_MODEL + name)


def _weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text("utf-8"))


def _renamed(weights: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(name): tensor for name, tensor in weights.items()}


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}
