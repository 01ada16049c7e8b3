"""Adapted layers that read the same tensor, computed as one operation: q, k and v of a layer; the captions' k and v of
all layers; any other adapted layer by itself. Their gradients go straight into the pack's arena.

The first of such layers that is called computes them all, and the others take theirs. So models stay as they are: what
tells that layers share an input is that they are given the same tensor object.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.models.adapters import StackedLora, layers
from dbtrain.settings.config import EngineConfig
from dbtrain_kernels.lora_group import lora_group

TOGETHER = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
)
"""Names of an attention's projections of one input, queries first: of images, of captions in joint attention, and of
text encoders. In cross-attention the queries have another input."""


class FusedProjections:
    """Layers that are given the same tensor, of one component. It holds tensors and no layers, so that nothing refers
    to itself.

    weight [O, D], bias [O]: of the frozen layers, side by side; theirs become views of them. The layers' matrices and
    their gradients must lie side by side in an arena; see `side_by_side`.
    """

    def __init__(self, layers: Sequence[StackedLora]):
        bases = [layer.base for layer in layers]
        downs, ups = [layer.down_NRD for layer in layers], [layer.up_NDR for layer in layers]
        self.widths = [layer.out_features for layer in layers]
        self.weight = _stacked([base.weight for base in bases])
        self.bias = None if bases[0].bias is None else _stacked([base.bias for base in bases])
        self.scale_N = layers[0].scale_N
        self.matrices = joined([down.data for down in downs]).requires_grad_(), joined([up.data for up in ups])
        self.into = joined([down.grad for down in downs]), joined([up.grad for up in ups])
        self.input: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}
        for place, layer in enumerate(layers):
            layer.fused = self, place

    def takes(self, x: Tensor) -> bool:
        """Whether an input can be computed here: not where it would have to be cast."""
        return x.dtype == self.weight.dtype

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of the layer at a place; those of the others wait for their calls."""
        if x is not self.input or place not in self.waiting:
            whole = lora_group(x, self.weight, self.bias, *self.matrices, self.scale_N, self.widths, self.into)
            if len(self.widths) == 1:
                return whole
            self.input, self.waiting = x, dict(enumerate(whole.split(self.widths, -1)))
        mine = self.waiting.pop(place)
        if not self.waiting:
            self.input = None
        return mine

    def forget(self) -> None:
        """Drop outputs that nobody asked for."""
        self.input, self.waiting = None, {}


def _stacked(params: Sequence[nn.Parameter]) -> Tensor:
    """The parameters in one tensor, which they become views of."""
    if len(params) == 1:
        return params[0].data
    whole = torch.cat([param.data for param in params])
    for param, part in zip(params, whole.split([len(param) for param in params])):
        param.data = part
    return whole


def joined(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices [N, S, W] that lie one after another in the rows of an arena, as one view [N, sum of S, W]."""
    first, place = matrices[0], matrices[0].storage_offset()
    rows = int(len(first) == 1)  # one row's stride says nothing, and may be any number
    for matrix in matrices:
        alike = matrix.storage_offset() == place and matrix.stride()[rows:] == first.stride()[rows:]
        assert alike, "not side by side in an arena"
        place += matrix[0].numel()
    shape = (len(first), sum(matrix.shape[1] for matrix in matrices), first.shape[2])
    return first.as_strided(shape, first.stride(), first.storage_offset())


def groups_of(model: nn.Module, all_captions: bool) -> list[list[StackedLora]]:
    """The adapted linear layers of a model by the input that they share, each layer in one group.

    all_captions: whether k and v of all cross-attention layers, whose input is the same, are one group. That is not for
    layers that are recomputed or compiled block by block.
    """
    groups: dict[tuple[Any, ...], list[StackedLora]] = {}
    for path, layer in layers(model):
        if type(layer.base) is nn.Linear and type(layer.base.weight) is nn.Parameter:  # not one in few bits
            groups.setdefault(_input_of(model, path, layer, all_captions), []).append(layer)
    return list(groups.values())


def _input_of(model: nn.Module, path: str, layer: StackedLora, all_captions: bool) -> tuple[Any, ...]:
    """A key that is equal for layers with the same input, width of it, dtype, and kind of bias."""
    above, _, name = path.rpartition(".")
    crosses = bool(getattr(model.get_submodule(above), "is_cross_attention", False))
    names = next((names for names in TOGETHER if name in names), None)
    if names is None or (crosses and name == names[0]):
        return (path,)
    place = "" if crosses and all_captions and names == TOGETHER[0] else above
    return place, names, layer.in_features, layer.base.bias is None, layer.base.weight.dtype


def side_by_side(params: dict[str, nn.Parameter], groups: Iterable[Sequence[StackedLora]]) -> dict[str, nn.Parameter]:
    """Parameters in the order in which an arena must hold them: all A of a group, then all its B; then the others."""
    order = [id(getattr(layer, kind)) for group in groups for kind in ("down_NRD", "up_NDR") for layer in group]
    place = {one: number for number, one in enumerate(order)}
    return dict(sorted(params.items(), key=lambda named: place.get(id(named[1]), len(place))))


def fuses(settings: EngineConfig, device_type: str) -> bool:
    """Whether a pack's layers compute together, as `engine.fused_projections` says."""
    chosen = settings.fused_projections
    return chosen == "on" or (chosen == "auto" and device_type == "cuda")
