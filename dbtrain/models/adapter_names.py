"""Names of an adapter's matrices in files: diffusers' (PEFT's under the component) and kohya's, both ways."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from dbtrain.models.adapters import TEXT_MODEL, LoraWeights
from dbtrain.models.family import KohyaLayer

SHORT_CLIP = re.compile(r"(encoder\.layers|embeddings|final_layer_norm)\b")
"""How the path of a CLIP layer begins in transformers >= 5.6."""


def long_path(component: str, path: str) -> str:
    """A layer's path in files. Those of CLIP's text models begin with `text_model.`: diffusers with transformers < 5.6,
    ComfyUI and kohya know no other, and newer versions read both."""
    return TEXT_MODEL + path if component.startswith("text_encoder") and SHORT_CLIP.match(path) else path


def to_diffusers(weights: LoraWeights) -> dict[str, Tensor]:
    """State dict for `pipe.load_lora_weights`: PEFT's names under the component's, e.g. `unet.<path>.lora_A.weight`.

    Its readers disagree about alpha, so only a folded adapter means the same to all of them.
    """
    state = {}
    for component, matrices in weights.matrices.items():
        for path, (down, up) in matrices.items():
            trail = (1, 1) if f"{component}.{path}" in weights.conv else ()
            name = f"{component}.{long_path(component, path)}"
            state[f"{name}.lora_A.weight"] = down.reshape(*down.shape, *trail).contiguous()
            state[f"{name}.lora_B.weight"] = up.reshape(*up.shape, *trail).contiguous()
    return state


def to_kohya(weights: LoraWeights, layer_of: Callable[[str, str], KohyaLayer]) -> dict[str, Tensor]:
    """The names of kohya-ss and ComfyUI: `<name>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    layer_of: the family's own place of a layer, from its component and path. k layers that stand in one there become
    one adapter of k times the rank and alpha.
    """
    state: dict[str, Tensor] = {}
    fused: dict[tuple[str, tuple[int, ...]], dict[int, tuple[Tensor, Tensor]]] = {}
    for component, matrices in weights.matrices.items():
        for path, (down, up) in matrices.items():
            layer = layer_of(component, path)
            if len(layer.sizes) > 1:
                fused.setdefault((layer.name, layer.sizes), {})[layer.place] = down, up
                continue
            trail = (1, 1) if f"{component}.{path}" in weights.conv else ()
            state[f"{layer.name}.lora_down.weight"] = down.reshape(*down.shape, *trail).contiguous()
            state[f"{layer.name}.lora_up.weight"] = up.reshape(*up.shape, *trail).contiguous()
            state[f"{layer.name}.alpha"] = torch.tensor(weights.scale * len(down))
    for (name, sizes), parts in fused.items():
        down, up = _fused(parts, sizes)
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = down, up
        state[f"{name}.alpha"] = torch.tensor(weights.scale * len(down))
    return state


def _fused(parts: dict[int, tuple[Tensor, Tensor]], sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One adapter (A, B) of the layers with these numbers: A stacked, B block by block, zero for a layer that has none.

    The whole is then B A = (B_1 A_1; B_2 A_2; ...), one under the other as the layer has its outputs.
    """
    place, (down, up) = next(iter(parts.items()))
    unit = len(up) // sizes[place]
    empty = [(torch.zeros_like(down), up.new_zeros(unit * size, up.shape[1])) for size in sizes]
    found = [parts.get(number, nothing) for number, nothing in enumerate(empty)]
    return torch.cat([one for one, _ in found]), torch.block_diag(*(one for _, one in found))
