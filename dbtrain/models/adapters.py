"""Stacked LoRA layers: adapters of N subjects over one frozen base layer. Solo training is N = 1.

Inputs are subject-major, [N*b, ...]: the first b samples belong to subject 0, and so on. Names on disk follow
PEFT/diffusers and kohya; in memory a layer is known by its path in the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbtrain.errors import ConfigError, DataError
from dbtrain.models.family import Family, Models
from dbtrain.randomness import Purpose, stream_key, uniform_range
from dbtrain_kernels.lora import lora

ALL_ROWS = slice(None)
TEXT_MODEL = "text_model."
"""What the layers of a CLIP text model are called by in files, and in some models of transformers."""


class StackedLora(nn.Module):
    """A frozen linear layer or 1x1 convolution with N low-rank updates: y = base(x) + scale_n B_n A_n x.

    down_NRD [N, rank, in], up_NDR [N, out, rank]: the trained matrices, fp32. scale_N: alpha / rank of each subject.
    rows: adapters to apply: all of them, a slice, or one for each sample of a batch (see `chosen_rows`).
    folds: whether samples that share an adapter may go through one matrix, W + scale B A, where that is cheaper. It
    rounds otherwise, by how many samples share it, so a stack that trains does not.
    """

    folds = False

    def __init__(self, base: nn.Linear | nn.Conv2d, subjects: int, rank: int, scale: float):
        super().__init__()
        self.base = base
        (in_features, out_features), device = widths(base), base.weight.device
        self.down_NRD = nn.Parameter(torch.zeros(subjects, rank, in_features, device=device))
        self.up_NDR = nn.Parameter(torch.zeros(subjects, out_features, rank, device=device))
        self.register_buffer("scale_N", torch.full((subjects,), scale, device=device), persistent=False)
        self.rows: slice | Tensor = ALL_ROWS
        self.fused: tuple[Any, int] | None = None
        """The `FusedProjections` that computes this layer in training, and this layer's place there."""

    @property
    def in_features(self) -> int:
        """Input channels; diffusers' attention reads this attribute."""
        return widths(self.base)[0]

    @property
    def out_features(self) -> int:
        """Channels out."""
        return widths(self.base)[1]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, whose dtype some of diffusers' layers ask for."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, of the base layer's shape."""
        if self.fused and self.rows is ALL_ROWS and torch.is_grad_enabled() and self.fused[0].takes(x):
            return self.fused[0].output(self.fused[1], x)
        if isinstance(self.rows, Tensor) and self._folds(x, self.rows):
            return self._by_runs(x, self.rows)
        base = self.base(x)
        down_NRD, up_NDR, scale_N = self.down_NRD, self.up_NDR, self.scale_N
        if isinstance(self.rows, Tensor):
            rows = self.rows.repeat(len(x) // len(self.rows))
            down_NRD, up_NDR, scale_N = down_NRD[rows], up_NDR[rows], scale_N[rows]
        elif self.rows != ALL_ROWS:  # a slice of everything would still cost copies in backward
            down_NRD, up_NDR, scale_N = down_NRD[self.rows], up_NDR[self.rows], scale_N[self.rows]
        if not len(scale_N):
            return base
        if isinstance(self.base, nn.Conv2d):
            return lora(x.movedim(1, -1), base.movedim(1, -1), down_NRD, up_NDR, scale_N).movedim(-1, 1)
        return lora(x, base, down_NRD, up_NDR, scale_N)

    def _folds(self, x: Tensor, rows: Tensor) -> bool:
        """Whether a matrix for each run of samples is cheaper than the update: it costs R in out products, and saves
        R (in + out) for each position."""
        if not self.folds or torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != self.weight.dtype:
            return False
        runs = len(torch.unique_consecutive(rows))
        wide, out = widths(self.base)
        return x.numel() // wide * (wide + out) > runs * wide * out

    def _by_runs(self, x: Tensor, rows: Tensor) -> Tensor:
        """The layer's output, by runs of samples with one adapter, in all parts of the batch."""
        parts, weight = x.unflatten(0, (-1, len(rows))), self.weight
        product, done = F.conv2d if isinstance(self.base, nn.Conv2d) else F.linear, []
        runs, counts = torch.unique_consecutive(rows, return_counts=True)
        for row, samples in zip(runs.tolist(), parts.split(counts.tolist(), 1)):
            scale, up, down = (each[row].to(weight.dtype) for each in (self.scale_N, self.up_NDR, self.down_NRD))
            own = torch.addmm(weight.flatten(1), up, down, alpha=float(scale)).view_as(weight)
            done.append(product(samples.flatten(0, 1), own, self.base.bias).unflatten(0, (len(parts), -1)))
        return torch.cat(done, 1).flatten(0, 1)


def widths(layer: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear layer or channels of a convolution. A quantized weight may have another shape."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, nn.Conv2d)
    return layer.in_channels, layer.out_channels


def matching_layers(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Paths of the linear layers and 1x1 convolutions whose end matches a pattern, in model order."""
    patterns = tuple(patterns)
    return [
        path
        for path, module in model.named_modules()
        if _adaptable(module) and any(fnmatchcase(path, p) or fnmatchcase(path, f"*.{p}") for p in patterns)
    ]


def _adaptable(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def attach(model: nn.Module, patterns: Iterable[str], subjects: int, rank: int, alpha: float) -> list[StackedLora]:
    """The new adapter layers, put in the place of the matching layers; all of the model's own weights are frozen."""
    model.requires_grad_(False)
    paths = matching_layers(model, patterns)
    if not paths:
        raise ConfigError(
            f"lora.targets: no layer of {type(model).__name__} matches {', '.join(patterns)}; "
            "patterns are matched with the ends of layer names, such as attn1.to_q"
        )
    for path in paths:
        model.set_submodule(path, StackedLora(model.get_submodule(path), subjects, rank, alpha / rank))
    return [layer for _, layer in layers(model)]


def refuse_unstackable(model: nn.Module, unstackable: Mapping[str, str]) -> None:
    """Raise ConfigError where an adapter is on a layer that mixes the samples of subjects. unstackable: patterns of
    such layers, and why."""
    for path, _ in layers(model):
        for pattern, why in unstackable.items():
            if fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}"):
                raise ConfigError(
                    f"lora.targets: a pack cannot adapt {path}, since {why}; drop it, or set engine.kind=zero"
                )


def detach(model: nn.Module) -> None:
    """Put the base layers back."""
    for path, layer in layers(model):
        model.set_submodule(path, layer.base)


def layers(model: nn.Module) -> list[tuple[str, StackedLora]]:
    """(path, layer) of every adapter in a model."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, StackedLora)]


@contextmanager
def chosen_rows(models: Iterable[nn.Module], rows: Sequence[int]) -> Iterator[None]:
    """The stacks with sample i of a batch computed by adapter `rows[i]`; afterwards all of them in order again.

    Guidance makes a batch of twice as many samples, those without a prompt first: each half then takes the rows in
    order, and so does each part of any multiple.
    """
    stacks = [layer for model in models for _, layer in layers(model)]
    for layer in stacks:
        layer.rows = torch.tensor(rows, device=layer.scale_N.device)
    try:
        yield
    finally:
        for layer in stacks:
            layer.rows = ALL_ROWS


def fresh_row(model: nn.Module, prefix: str, rank: int, seed: int, subject: str) -> dict[str, Tensor]:
    """A subject's adapter before training, as [1, ...] float64 by name: A uniform in +-1/sqrt(in) as PEFT and nn.Linear
    do, B zero."""
    started = {}
    for path, layer in layers(model):
        width, out = layer.down_NRD.shape[2], layer.up_NDR.shape[1]
        draws = uniform_range(stream_key(seed, subject, prefix, path), Purpose.ADAPTER, rank * width)
        started[f"{prefix}.{path}.down_NRD"] = ((2 * draws - 1) * width**-0.5).view(1, rank, width)
        started[f"{prefix}.{path}.up_NDR"] = torch.zeros(1, out, rank, dtype=torch.float64)
    return started


@torch.no_grad()
def reset_row(model: nn.Module, prefix: str, row: int, seed: int, subject: str) -> None:
    """Start a subject afresh in a row, at the rank of the stack."""
    found = layers(model)
    started = fresh_row(model, prefix, found[0][1].down_NRD.shape[1], seed, subject)
    for path, layer in found:
        layer.down_NRD[row] = started[f"{prefix}.{path}.down_NRD"][0].to(layer.down_NRD)
        layer.up_NDR[row] = 0


@dataclass(frozen=True)
class LoraWeights:
    """One subject's adapter: {model path: (A [rank, in], B [out, rank])} for each component, with its alpha.

    Components are named `unet` (or `transformer`), `text_encoder`, `text_encoder_2`. conv: paths of 1x1 convolutions.
    rank: the largest of any layer. The update of every layer is alpha / rank * B A, whatever the layer's own rank.
    """

    matrices: dict[str, dict[str, tuple[Tensor, Tensor]]]
    alpha: float
    rank: int
    conv: frozenset[str] = frozenset()

    @property
    def scale(self) -> float:
        """What every layer's B A is multiplied by."""
        return self.alpha / self.rank

    def folded(self, weight: float = 1.0) -> LoraWeights:
        """The same adapter at scale 1 (alpha = rank): the scale, and a weight of one's own, multiplied into B."""
        factor = self.scale * weight
        if factor == 1:
            return self if self.alpha == self.rank else replace(self, alpha=float(self.rank))
        matrices = {
            component: {path: (down, up * factor) for path, (down, up) in layers.items()}
            for component, layers in self.matrices.items()
        }
        return replace(self, matrices=matrices, alpha=float(self.rank))


def from_state(trained: dict[str, Tensor], components: dict[str, nn.Module], alpha: float) -> LoraWeights:
    """A subject's adapter in an engine state: [1, ...] matrices by `<component>.<path>.down_NRD` and `.up_NDR`."""
    matrices: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    conv, rank = set(), 0
    for component, model in components.items():
        for path, layer in layers(model):
            down, up = (trained[f"{component}.{path}.{kind}"][0].float().cpu() for kind in ("down_NRD", "up_NDR"))
            matrices.setdefault(component, {})[path] = down, up
            rank = len(down)
            if isinstance(layer.base, nn.Conv2d):
                conv.add(f"{component}.{path}")
    return LoraWeights(matrices, alpha, rank, frozenset(conv))


@torch.no_grad()
def write_rows(components: dict[str, nn.Module], row: int, weights: LoraWeights) -> None:
    """Copy an adapter into a row; its rank may be smaller than the stack's (padded with zeros)."""
    for component, matrices in weights.matrices.items():
        stack = dict(layers(components[component]))
        for path, (down, up) in matrices.items():
            layer = stack[path]
            layer.down_NRD[row] = 0
            layer.up_NDR[row] = 0
            layer.down_NRD[row, : down.shape[0]] = down.to(layer.down_NRD)
            layer.up_NDR[row, :, : up.shape[1]] = up.to(layer.up_NDR)
            layer.scale_N[row] = weights.scale


def renamed(components: dict[str, nn.Module], weights: LoraWeights) -> LoraWeights:
    """The adapter with the names that its text layers have in these models.

    transformers 5.6 dropped `text_model.` from a CLIPTextModel and kept it in a CLIPTextModelWithProjection; files hold
    the long names, and older files of dbtrain the short ones.
    """

    def name_in(model: nn.Module | None, path: str) -> str:
        short = path.removeprefix(TEXT_MODEL)
        other = short if short != path else TEXT_MODEL + path
        known = model is None or has_layer(model, path) or not has_layer(model, other)
        return path if known else other

    names = {
        f"{component}.{path}": name_in(components.get(component), path)
        for component, matrices in weights.matrices.items()
        for path in matrices
    }
    matrices = {
        component: {names[f"{component}.{path}"]: pair for path, pair in matrices.items()}
        for component, matrices in weights.matrices.items()
    }
    conv = frozenset(f"{full.partition('.')[0]}.{names[full]}" for full in weights.conv)
    return replace(weights, matrices=matrices, conv=conv)


def has_layer(model: nn.Module, path: str) -> bool:
    """Whether a model has a module of this path."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def refuse_misfit(components: dict[str, torch.nn.Module], weights: LoraWeights) -> None:
    """Raise DataError unless every matrix of an adapter belongs to a layer of the base, in that layer's shape."""
    for component, matrices in weights.matrices.items():
        for path, (down, up) in matrices.items():
            try:
                layer = components[component].get_submodule(path)
            except (KeyError, AttributeError) as error:
                raise DataError(f"adapter: {component}.{path} is no layer of this base; use its own base") from error
            if not _adaptable(layer):
                raise DataError(f"adapter: {component}.{path} is no linear layer of this base; use its own base")
            rank, (wide, out) = len(down), widths(layer)
            want = ((rank, wide), (out, rank))
            if (down.shape, up.shape) != want:
                got = f"{tuple(down.shape)} and {tuple(up.shape)}"
                wanted = f"{want[0]} and {want[1]}"
                raise DataError(f"adapter: {component}.{path}: got {got}, want {wanted}; use its own base")


@contextmanager
def adapter(family: Family, models: Models, *weights: LoraWeights, folds: bool = False) -> Iterator[None]:
    """The base with an adapter on it, or with several as the rows of one stack; afterwards the base as it was."""
    try:
        put_on(family, models, *weights, folds=folds)
        yield
    finally:
        for module in models.components(family.denoiser).values():
            detach(module)


def put_on(family: Family, models: Models, *weights: LoraWeights, folds: bool = False) -> None:
    """Put an adapter on the base, or several as the rows of one stack, to stay. folds: see `StackedLora`.

    Adapters of a stack may differ in rank and in layers: what one of them lacks is 0.
    """
    components = models.components(family.denoiser)
    weights = tuple(renamed(components, one) for one in weights)
    for one in weights:
        refuse_misfit(components, one)
    rank = max(one.rank for one in weights)
    for name in dict.fromkeys(name for one in weights for name in one.matrices):
        paths = dict.fromkeys(path for one in weights for path in one.matrices.get(name, ()))
        for layer in attach(components[name], paths, len(weights), rank, float(rank)):
            layer.folds = folds
    for row, one in enumerate(weights):
        write_rows(components, row, one)
