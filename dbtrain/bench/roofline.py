"""`dbtrain bench model`: what a LoRA step of a published architecture asks of a graphics card, without having one.

The whole step of the real architecture runs on PyTorch's meta device, where operators have shapes and no numbers: its
kernels, bytes, floating-point operations and kept activations are exact counts. Milliseconds are a model: an operator
takes the longest of its launch, its bytes at the card's bandwidth and its operations at the card's rate, by the shares
of published peaks in `REACHED`. Nothing of it was measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dbtrain.bench.cards import CARDS, Card
from dbtrain.bench.gpu_forms import SEVERAL, as_cudnn, bytes_of, flash, one_kernel_norms
from dbtrain.bench.operators import Operators
from dbtrain.engines import packed
from dbtrain.engines.engine import ParamGroup
from dbtrain.errors import ConfigError, first_line
from dbtrain.families import FAMILIES
from dbtrain.models.adapters import attach
from dbtrain.models.architectures import Architecture
from dbtrain.models.base_check import read_json
from dbtrain.models.family import Family, Models
from dbtrain.models.fused_pointwise import fuse_pointwise
from dbtrain.models.fused_projections import FusedProjections, groups_of, side_by_side
from dbtrain.models.load import quiet_libraries
from dbtrain.objective.noise import discrete_schedule, flow_schedule
from dbtrain.settings import recipes
from dbtrain.settings.config import RunConfig, TrainConfig
from dbtrain.training.step import TrainingStep
from dbtrain.training.trainables import RECOMPUTED
from dbtrain.values import Batch, Conditioning
from dbtrain_kernels import of_operators

GIB = 2**30
LAUNCH_US = 1.6
"""Least time of a kernel in a recorded step."""
REACHED = {"convolutions": 0.50, "matrix products": 0.52, "attention": 0.385, "attention, backward": 0.29}
"""Share of a card's published peak that the operators of a part reach: 80 % for the best matrix product, times what a
GPU profile of the same libraries showed of that."""
FASTER = {"flash": 1.0, "cudnn": 1.4}
"""How many times the rate of FlashAttention 2, which `REACHED` holds, an attention on Hopper makes: cuDNN's or
FlashAttention 3, whose paper measures 1.5 and more (arXiv 2407.08608)."""
COPIED = 0.79
"""Share of the published bandwidth that pointwise kernels reach: 90 % for a copy, times 88 %."""
TILE = 64
"""Attention's kernels fill up a head's features to a multiple of this, and compute all of them."""


@dataclass
class Part:
    """Counts of one part of a step. rows: (kernels, bytes, operations) of each of its operators."""

    rows: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def sums(self) -> tuple[int, int, int]:
        """(kernels, bytes, operations) of all of them."""
        return tuple(map(sum, zip(*self.rows))) if self.rows else (0, 0, 0)  # type: ignore[return-value]

    def times_ms(self, name: str, card: Card) -> dict[str, float]:
        """Milliseconds by what bounds them: `launches`, `memory`, `compute`."""
        rate, bandwidth = card.tflops * 1e9 * REACHED.get(name, 0.5), card.tbytes * 1e9 * COPIED
        wide = 2 if card.dtype == torch.float32 else 1
        spent = {"launches": 0.0, "memory": 0.0, "compute": 0.0}
        for kernels, moved, operations in self.rows:
            bounds = {"launches": kernels * LAUNCH_US / 1e3, "memory": moved * wide / bandwidth,
                      "compute": operations / rate}  # fmt: skip
            worst = max(bounds, key=lambda bound: bounds[bound])
            spent[worst] += bounds[worst]
        return spent


@dataclass(frozen=True)
class Counts:
    """A step's exact counts. params: of the frozen denoiser; trained: of one subject's adapter; layers: adapted.
    operations: of the whole step; forward: of one sample's forward pass. kept: bytes that backward needs of all
    samples. parts: with attention's operations as its kernels do them, on whole tiles of features."""

    name: str
    subjects: int
    layers: int
    params: int
    trained: int
    operations: int
    forward: int
    kept: int
    parts: dict[str, Part]

    def memory_gib(self, card: Card) -> float:
        """Weights of the denoiser, arenas (masters, gradients, two moments in fp32, a copy to compute with), and kept
        activations. Text encoders and VAE are not there while a step runs from caches."""
        wide = card.dtype.itemsize
        state = self.trained * self.subjects * (16 + (wide if wide < 4 else 0))
        return (self.params * wide + state + self.kept * wide / 2) / GIB


class _Costs(Operators):
    """Kernels, bytes and operations of each operator, by the part of the step that it belongs to."""

    def __init__(self) -> None:
        super().__init__("meta")
        self.ours = of_operators("flops")
        self.again = of_operators("again") | {name: places for name, (_, places) in SEVERAL.items()}
        self.parts: dict[str, Part] = {}
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        result, copies, copied = as_cudnn(func._schema.name.split("::")[1], args, result)
        if copies:
            self.note("layout of convolutions", copies, copied, 0)
        return result

    def saw(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, kernels: int) -> None:
        moved = sum(bytes_of(value) for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor))
        moved += sum(bytes_of(args[place]) for place in self.again.get(name, ()))
        kernels, operations = SEVERAL.get(name, (kernels,))[0], 0
        if func.namespace == "dbtrain" and name in self.ours:
            shapes = [value.shape if isinstance(value, Tensor) else value for value in args]
            operations = self.ours[name](*shapes)
        elif formula := flop_registry.get(func._overloadpacket):
            operations = int(formula(*args, **kwargs, out_val=result))
        self.operations += operations
        if "attention" in name:
            width = args[0].shape[-1]
            operations = operations * (width + -width % TILE) // width
        self.note(_part(name), kernels, moved, operations)

    def note(self, part: str, kernels: int, moved: int, operations: int) -> None:
        """Add a row to a part."""
        self.parts.setdefault(part, Part()).rows.append((kernels, moved, operations))


def _part(name: str) -> str:
    for part, words in PARTS.items():
        if any(word in name for word in words):
            return part
    return POINTWISE


POINTWISE = "pointwise, norms, copies"
PARTS = {
    "attention, backward": ("attention_backward",), "attention": ("attention",), "convolutions": ("convolution",),
    "LoRA": ("lora", "shrink", "expand", "outer", "add_parts"), "update": ("adamw", "norms", "foreach"),
    "matrix products": ("mm", "matmul", "linear"),
}  # fmt: skip
"""Parts of a step by a word in an operator's name; the first that fits."""


ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
"""Stable Diffusion's schedule."""
VAE = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.18215, shift_factor=None))


def architectures() -> dict[str, tuple[Family, Architecture]]:
    """Every published architecture with its family, by its name in the family's row."""
    return {name: (family, shape) for family in FAMILIES.values() for name, shape in family.shapes.items()}


def captions_of(shape: Architecture, rows: int, dtype: torch.dtype) -> Conditioning:
    """Captions of an architecture, as shapes."""
    states = torch.empty(rows, shape.tokens, shape.width, device="meta", dtype=dtype)
    return Conditioning(states, shape.pooled and torch.empty(rows, shape.pooled, device="meta", dtype=dtype))


def batch_of(family: Family, shape: Architecture, subjects: int) -> Batch:
    """One photo and one prior of each subject, as cached moments; for a denoiser that enlarges, with their small
    pictures, of a quarter of the side."""
    count, side = 2 * subjects, shape.latent_side
    small = side * family.codec.cell // 4
    whole = torch.empty(count, dtype=torch.long, device="meta")
    moments = torch.empty(count, 2 * shape.channels, side, side, device="meta")
    low = torch.empty(count, 3, small, small, device="meta") if family.guide else None
    return Batch(moments, whole, whole, whole, torch.empty(count, 6, device="meta"), whole, low_BCHW=low)


@dataclass(frozen=True)
class MetaStep:
    """A pack's step on the meta device, in two halves. layers: adapted; params: frozen; trained: of one subject."""

    forward: Callable[[], Any]
    backward: Callable[[Any], None]
    layers: int
    params: int
    trained: int


def meta_step(
    family: Family, shape: Architecture, subjects: int, targets: Iterable[str], rank: int = 16, recompute: bool = False,
    fused: bool = True, pointwise: bool = True, last: bool = True,
) -> MetaStep:  # fmt: skip
    """What `packing.pack.Pack.advance` does but for its statistics, in bf16, latents and captions cached. fused: with
    `engine.fused_projections`; pointwise: with `engine.fused_pointwise`; last: with `engine.channels_last`."""
    denoiser = shape.blank("meta")
    if pointwise:
        fuse_pointwise(denoiser)
    if last:
        denoiser.to(memory_format=torch.channels_last)
    params = sum(param.numel() for param in denoiser.parameters())
    layers = attach(denoiser, targets, subjects, rank, rank)
    if recompute:
        denoiser.train().enable_gradient_checkpointing(RECOMPUTED)
    config = RunConfig(train=TrainConfig(precision="bf16"))
    trained = {key: param for key, param in denoiser.named_parameters() if param.requires_grad}
    number = sum(param.numel() for param in trained.values()) // subjects
    together = groups_of(denoiser, all_captions=not recompute) if fused else []
    groups = [ParamGroup(side_by_side(trained, together), 1e-4)]
    engine = packed.PackedEngine(groups, config.train, 1000, torch.bfloat16)
    projections = [FusedProjections(own) for own in together]
    is_flow = family.schedule.__module__.endswith(".flow")
    schedule = flow_schedule() if is_flow else discrete_schedule(ALPHA_BAR, "epsilon")
    levels = discrete_schedule(ALPHA_BAR, "epsilon") if family.guide else None
    models = Models(denoiser, {}, {}, VAE, None, schedule, "meta", levels=levels)  # type: ignore[arg-type]
    keys, priors = torch.empty(subjects, 2, dtype=torch.long, device="meta"), torch.empty(subjects, device="meta")
    captions = captions_of(shape, 2 * subjects, torch.float32)
    module = TrainingStep(family, models, config, keys, captions, priors)
    meta = torch.device("meta")
    module.schedule = schedule.to(meta)
    if levels is not None:
        module.levels, module.level_S = levels.to(meta), module.level_S.to(meta)
    assert module.first_S is not None, "levels are drawn by a table"
    module.weight_S, module.first_S = module.weight_S.to(meta), module.first_S.to(meta)
    batch = batch_of(family, shape, subjects)

    def forward() -> Any:
        for own in projections:
            own.forget()
        return module(batch, engine.step_N)

    def backward(loss: Any) -> None:
        loss.loss.backward()
        engine.update(torch.isfinite((loss.per_sample_B * loss.weight_B).view(subjects, -1).sum(1)))

    return MetaStep(forward, backward, len(layers), params, number)


def count(
    name: str, family: Family, shape: Architecture, subjects: int, targets: Iterable[str], recompute: bool = False,
    fused: bool = True, pointwise: bool = True, last: bool = True,
) -> Counts:  # fmt: skip
    """The exact counts of a `meta_step`. Raises ConfigError where it needs real numbers, which `meta` lacks."""
    quiet_libraries()
    # Captions without a mask count where a family takes them; else a mask of real tokens, whose numbers a family with
    # ragged captions reads on the host.
    for mask in (None, "meta", "cpu"):
        try:
            masked = _masked(family, mask)
            forms = {"recompute": recompute, "fused": fused, "pointwise": pointwise, "last": last}
            step = meta_step(masked, shape, subjects, targets, **forms)
            with flash(), _Costs() as costs, one_kernel_norms(partial(costs.note, POINTWISE)):
                loss, kept = _with_kept(step.forward)
                forward = costs.operations // (2 * subjects)
                step.backward(loss)
            break
        except (NotImplementedError, RuntimeError, AssertionError, AttributeError) as error:
            why = first_line(error) or "it wants a mask of its captions"
    else:
        raise ConfigError(f"{name}: cannot be counted without real numbers: {why}")
    sizes = (step.layers, step.params, step.trained)
    return Counts(name, subjects, *sizes, costs.operations, forward, kept, dict(sorted(costs.parts.items())))


def _masked(family: Family, device: str | None) -> Family:
    """The family, given captions with a mask on this device on which each token is real."""
    if device is None:
        return family

    def denoise(denoiser: Any, x_t: Tensor, time_B: Tensor, told: Conditioning, batch: Batch) -> Tensor:
        mask_BT = torch.ones(told.states_BTD.shape[:2], dtype=torch.bool, device=device)
        return family.denoise(denoiser, x_t, time_B, replace(told, mask_BT=mask_BT), batch)

    return replace(family, denoise=denoise)


def _with_kept(forward: Callable[[], Any]) -> tuple[Any, int]:
    """What a forward pass returns, and the bytes of all tensors that its backward needs, parameters and inputs left
    out; each memory counts once."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:
            memory = tensor.untyped_storage()
            seen[memory._cdata] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    return result, sum(seen.values())


def modelled(counts: Counts, card: Card, attention: str = "flash") -> dict[str, Any]:
    """Milliseconds of a step on a card: `floor` with every operation at the published peak or every byte at the
    published bandwidth, and the model's, by parts with what bounds each. attention: one of `FASTER`."""
    wide = 2 if card.dtype == torch.float32 else 1
    kernels, moved, _ = map(sum, zip(*(part.sums for part in counts.parts.values())))
    parts: dict[str, dict[str, Any]] = {}
    for name, part in counts.parts.items():
        times = part.times_ms(name, card)
        faster = FASTER[attention] if name.startswith("attention") else 1.0
        parts[name] = {"ms": sum(times.values()) / faster, "bound": max(times, key=lambda bound: times[bound])}
    total = sum(part["ms"] for part in parts.values())
    memory = counts.memory_gib(card)
    return {
        "kernels": kernels, "gb": moved * wide / 1e9, "tflop": counts.operations / 1e12,
        "floor_ms": counts.operations / card.tflops / 1e9, "modelled_ms": total,
        "a_subject_ms": total / counts.subjects, "memory_gib": memory, "fits": memory < card.gib * 0.92, "parts": parts,
    }  # fmt: skip


def targets_of(family: Family) -> tuple[str, ...]:
    """The layers that a family's shipped recipe adapts."""
    return (recipes.shipped_for(family.name) or RunConfig()).lora.targets


def measure(
    names: Sequence[str], sizes: Sequence[int], cards: Sequence[str], recompute: bool, say: Callable[[Any], None],
    attention: str = "flash",
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each architecture, pack size and card, and each row told as it is made. names: of architectures, or of
    families for all of theirs. Raises ConfigError for names that are not known."""
    known = architectures()
    chosen = {own: known[own] for name in names for own in known if name in (own, known[own][0].name)}
    for wrong in [name for name in names if not any(name in (own, row[0].name) for own, row in known.items())]:
        raise ConfigError(f"bench model: no architecture {wrong!r}; give one of {', '.join([*known, *FAMILIES])}")
    for wrong in [card for card in cards if card not in CARDS]:
        raise ConfigError(f"--card: got {wrong!r}, want {', '.join(CARDS)}, with commas")
    if attention not in FASTER:
        raise ConfigError(f"--attention: got {attention!r}, want {' or '.join(FASTER)}")
    rows = []
    for name, (family, shape) in chosen.items():
        for size in sizes:
            counts = count(name, family, shape, size, targets_of(family), recompute)
            for card in cards:
                row = {
                    "model": name, "subjects": size, "card": card, "recompute": recompute, "params": counts.params,
                    "layers": counts.layers, "trained": counts.trained, "forward_tflop": counts.forward / 1e12,
                    "kept_gib": counts.kept / GIB / (2 * size), **modelled(counts, CARDS[card], attention),
                }  # fmt: skip
                say(row)
                rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each row, and the parts of a single one."""
    heads = ("model", "subjects", "card", "kernels", "GB moved", "TFLOP", "floor, ms", "modelled, ms", "a subject, ms",
             "bound by", "memory, GiB", "fits")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        bounds: dict[str, float] = {}
        for part in row["parts"].values():
            bounds[part["bound"]] = bounds.get(part["bound"], 0) + part["ms"]
        lines.append(
            f"| {row['model']} | {row['subjects']} | {row['card']} | {row['kernels']:,} | {row['gb']:,.0f} "
            f"| {row['tflop']:,.1f} | {row['floor_ms']:,.1f} | {row['modelled_ms']:,.0f} | {row['a_subject_ms']:,.1f} "
            f"| {max(bounds, key=lambda bound: bounds[bound])} | {row['memory_gib']:,.1f} "
            f"| {'yes' if row['fits'] else 'no'} |"
        )
    if len(rows) == 1:
        lines += ["", "| part | ms | bound by |", "|---|---|---|"]
        lines += [f"| {name} | {part['ms']:,.2f} | {part['bound']} |" for name, part in rows[0]["parts"].items()]
    return "\n".join(lines)


WIDTHS = ("cross_attention_dim", "encoder_hid_dim", "joint_attention_dim", "cap_feat_dim", "caption_channels",
          "llm_features_dim")  # fmt: skip
SIZES = dict.fromkeys(WIDTHS, "width") | {"pooled_projection_dim": "pooled", "sample_size": "latent_side"}
"""Entries of a denoiser's configuration that say how large captions are, and the latents of a U-Net."""


def shape_of(family: Family, folder: Path) -> Architecture:
    """The architecture of a base in a diffusers folder: the published one that is most alike, with the folder's
    configuration. Images are of the published size."""
    told = {key: value for key, value in read_json(folder / family.denoiser / "config.json").items() if key[0] != "_"}
    told = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    like = max(family.shapes.values(), key=lambda shape: sum(told.get(k) == v for k, v in shape.config.items()))
    sizes = {field: told[key] for key, field in SIZES.items() if isinstance(told.get(key), int)}
    if "num_text_layers" in told:  # layers side by side
        sizes["width"] = told["text_hidden_dim"] * told["num_text_layers"]
    if told.get("in_channels") != like.config.get("in_channels") and like.channels == like.config.get("in_channels"):
        sizes["channels"] = told["in_channels"]
    if "projection_class_embeddings_input_dim" in told and like.pooled:
        sizes["pooled"] = told["projection_class_embeddings_input_dim"] - 6 * told["addition_time_embed_dim"]
    return replace(like, config=told, **sizes)
