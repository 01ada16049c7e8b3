"""Names of an adapter's matrices in files: diffusers' (PEFT's under the component) and kohya's, both ways."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from dbtrain.models.adapters import TEXT_MODEL, LoraWeights

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


def to_kohya(weights: LoraWeights, name_of: Callable[[str, str], str]) -> dict[str, Tensor]:
    """The names of kohya-ss and ComfyUI: `<name>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    name_of: the family's own name of a layer, from its component and path.
    """
    state = {}
    for component, matrices in weights.matrices.items():
        for path, (down, up) in matrices.items():
            name = name_of(component, path)
            trail = (1, 1) if f"{component}.{path}" in weights.conv else ()
            state[f"{name}.lora_down.weight"] = down.reshape(*down.shape, *trail).contiguous()
            state[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *trail).contiguous()
            state[f"{name}.alpha"] = torch.tensor(weights.scale * len(down))
    return state
