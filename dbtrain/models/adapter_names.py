"""Names of an adapter's matrices in files: diffusers' (PEFT's under the component) and kohya's, both ways."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from dbtrain.models.adapters import (
    LoraWeights,
)


def to_diffusers(weights: LoraWeights) -> dict[str, Tensor]:
    """State dict for `pipe.load_lora_weights`: PEFT's names under the component's, e.g. `unet.<path>.lora_A.weight`."""
    state = {}
    for component, matrices in weights.matrices.items():
        for path, (down, up) in matrices.items():
            trail = (1, 1) if f"{component}.{path}" in weights.conv else ()
            state[f"{component}.{path}.lora_A.weight"] = down.reshape(*down.shape, *trail).contiguous()
            state[f"{component}.{path}.lora_B.weight"] = up.reshape(*up.shape, *trail).contiguous()
    return state


def from_diffusers(state: dict[str, Tensor], alpha: float | None = None) -> LoraWeights:
    """The adapter in a state dict of `to_diffusers`; alpha None is alpha = rank."""
    matrices: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    conv = set()
    for name in sorted(state):
        if not name.endswith(".lora_A.weight"):
            continue
        full = name.removesuffix(".lora_A.weight")
        component, path = full.split(".", 1)
        down, up = state[name], state[f"{full}.lora_B.weight"]
        if down.dim() == 4:
            conv.add(full)
        matrices.setdefault(component, {})[path] = (down.flatten(1), up.flatten(1))
    rank = next(down.shape[0] for group in matrices.values() for down, _ in group.values())
    return LoraWeights(matrices, rank if alpha is None else alpha, rank, frozenset(conv))


KOHYA_PREFIX = {
    "sd": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sdxl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
SDXL_BLOCKS: list[tuple[str, Callable[[int, int], str]]] = [
    (r"down_blocks\.(\d)\.resnets\.(\d)", lambda i, j: f"input_blocks.{3 * i + j + 1}.0"),
    (r"down_blocks\.(\d)\.attentions\.(\d)", lambda i, j: f"input_blocks.{3 * i + j + 1}.1"),
    (r"mid_block\.(resnets)\.(\d)", lambda _, j: f"middle_block.{2 * j}"),
    (r"mid_block\.(attentions)\.(\d)", lambda _, j: "middle_block.1"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda i, j: f"output_blocks.{3 * i + j}.0"),
    (r"up_blocks\.(\d)\.attentions\.(\d)", lambda i, j: f"output_blocks.{3 * i + j}.1"),
]
"""Stability's names of SDXL's blocks (two layers a block), which kohya's sd-scripts use, by diffusers' names."""
SDXL_LAYERS = {"conv_shortcut": "skip_connection", "time_emb_proj": "emb_layers.1"}


def to_kohya(weights: LoraWeights, family: str = "sd") -> dict[str, Tensor]:
    """The names of kohya-ss and ComfyUI: `lora_unet_<path with _>.lora_down.weight`, `.lora_up`, `.alpha`.

    family "sdxl" has Stability's block names and the text encoders `lora_te1` and `lora_te2`; "sd" has diffusers' block
    names and `lora_te`. transformers >= 5.6 dropped CLIP's `text_model.`; kohya keeps it.
    """
    state = {}
    for component, matrices in weights.matrices.items():
        for path, (down, up) in matrices.items():
            name = f"{KOHYA_PREFIX[family][component]}_{_kohya_path(component, path, family).replace('.', '_')}"
            trail = (1, 1) if f"{component}.{path}" in weights.conv else ()
            state[f"{name}.lora_down.weight"] = down.reshape(*down.shape, *trail).contiguous()
            state[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *trail).contiguous()
            state[f"{name}.alpha"] = torch.tensor(float(weights.alpha))
    return state


def _kohya_path(component: str, path: str, family: str) -> str:
    if component != "unet":
        return path if path.startswith("text_model.") else f"text_model.{path}"
    if family != "sdxl":
        return path
    for pattern, rename in SDXL_BLOCKS:
        match = re.match(pattern, path)
        if match:
            block, layer = (int(part) if part.isdigit() else 0 for part in match.groups())
            path = rename(block, layer) + path[match.end() :]
    head, _, tail = path.rpartition(".")
    return f"{head}.{SDXL_LAYERS.get(tail, tail)}" if head else path
