"""Names of an adapter's matrices in files: diffusers' (PEFT's under the component) and kohya's, both ways."""

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
            state[f"{name}.alpha"] = torch.tensor(float(weights.alpha))
    return state
