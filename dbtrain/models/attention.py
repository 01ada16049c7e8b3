"""Attention: what computes softmax(Q K^T / sqrt(d)) V in a denoiser, by name or by measurement, proved by what ran.

The U-Nets of Stable Diffusion and SDXL get another processor. Each layer of another denoiser keeps the computation of
its own processor, with one of PyTorch's backends allowed: `set_attention_backend` of diffusers would set the default of
every model in the process, and some transformers ignore it.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from dbtrain.errors import ConfigError, first_line

KERNELS = (
    ("_scaled_dot_product_flash_attention", "flash"),
    ("_scaled_dot_product_efficient_attention", "efficient"),
    ("_scaled_dot_product_cudnn_attention", "cudnn"),
    ("xformers", "xformers"),
    ("mslk", "xformers"),
    ("_efficient_attention_forward", "xformers"),
    ("_flash_attention_forward", "xformers"),
    ("softmax", "math"),
)
"""What an operator's name tells of who computes attention; the first match counts."""

MAY_RUN = {
    "sdpa": {"flash", "efficient", "cudnn", "math"},
    "flash": {"flash"},
    "cudnn": {"cudnn"},
    "math": {"math"},
    "xformers": {"xformers"},
}
"""The kernels that a choice may end in. `sdpa` is PyTorch's own pick."""

NONE_FITS = ("No available kernel", "No viable backend")
"""What PyTorch says where the backends that are allowed cannot compute an attention, on a GPU and on a CPU."""

CANDIDATES = ("sdpa", "flash", "cudnn", "xformers")
"""What `auto` compares on a GPU, in the order in which ties go."""


class Shape(NamedTuple):
    """One attention: [batch, heads, queries, width] against [batch, heads, keys, width]."""

    device: str
    dtype: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int


MEASURED: dict[Shape, dict[str, float]] = {}
"""Median ms of forward and backward of every candidate, for each shape that this process has met."""


@dataclass
class Attention:
    """What runs in every layer of a denoiser, and why. shapes: those that `auto` has met, with the winner of each.

    ran: the kernels that computed the first real step; empty before it. PyTorch's own pick depends on the shape, so the
    small proof at the start cannot tell them. must: the kernels that alone may run then; empty where all may.
    """

    name: str
    reason: str
    shapes: dict[Shape, str] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    must: frozenset[str] = frozenset()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record which kernels compute attention inside the block, once; later blocks cost nothing. Raises ConfigError
        where others ran than must."""
        if self.ran:
            yield
            return
        with explained(f"{self.name} cannot run here", *NONE_FITS) if self.must else nullcontext(), Ran() as ran:
            yield
        if self.must and (not ran.kernels or ran.kernels - self.must):
            found = " and ".join(sorted(ran.kernels)) or "no known kernel"
            raise ConfigError(f"model.attention: asked for {self.name}, but {found} runs; use model.attention=auto")
        self.ran |= ran.kernels

    def row(self) -> dict[str, Any]:
        """For the record of a run: choice, reason, and the table behind a measured choice."""
        table = [
            {**shape._asdict(), "chosen": name, "ms": MEASURED.get(shape, {})} for shape, name in self.shapes.items()
        ]
        row: dict[str, Any] = {"name": self.name, "reason": self.reason}
        return row | ({"ran": sorted(self.ran)} if self.ran else {}) | ({"shapes": table} if table else {})


def engage_attention(denoiser: nn.Module, choice: str, device_type: str, precision: str = "fp32") -> Attention:
    """What now runs in every attention layer of a denoiser; raises ConfigError, and changes nothing, when it cannot.

    A choice is believed only after a small forward pass of every kind of layer of a U-Net: the operators that ran say
    who computed it. Layers of other denoisers take too many kinds of input; `Attention.watched` finds out there.
    precision: the compute precision of training.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    if not all(isinstance(layer.processor, exchangeable()) for layer in attention_layers(denoiser).values()):
        return _engage_backend(denoiser, choice, device_type, dtype)
    before = denoiser.attn_processors
    if choice == "auto":
        return _engage_auto(denoiser, device_type, precision)
    try:
        _require(choice, device_type, dtype)
        denoiser.set_attn_processor(processor_of(choice))
        ran = prove(denoiser, choice, device_type, dtype)
    except ConfigError:
        denoiser.set_attn_processor(before)
        raise
    return Attention(choice, f"asked for; {' and '.join(sorted(ran))} ran in every kind of layer")


def _engage_backend(denoiser: nn.Module, choice: str, device_type: str, dtype: torch.dtype) -> Attention:
    if choice == "xformers":
        raise ConfigError(
            f"model.attention: xformers is for the U-Nets of Stable Diffusion and SDXL, got {type(denoiser).__name__}; "
            "use flash, cudnn or auto"
        )
    _require(choice, device_type, dtype)
    limited = choice in BACKENDS
    for layer in attention_layers(denoiser).values():
        own: Any = getattr(layer.processor, "own", type(layer.processor))
        layer.processor = (limited_to(own, choice) if limited else own)()
    if not limited:
        return Attention("sdpa", f"{choice}: its own processors call PyTorch's own pick")
    return Attention(choice, "asked for; its own processors may call nothing else", must=frozenset(MAY_RUN[choice]))


def _engage_auto(denoiser: nn.Module, device_type: str, precision: str) -> Attention:
    if device_type != "cuda":
        attention = engage_attention(denoiser, "sdpa", device_type, precision)
        attention.reason = f"auto: nothing else is meant for {device_type}"
        return attention
    if torch.are_deterministic_algorithms_enabled():
        attention = engage_attention(denoiser, "sdpa", device_type, precision)
        attention.reason = "auto: engine.deterministic allows no choice by time"
        return attention
    able, refused = [], []
    for name in CANDIDATES:
        try:
            engage_attention(denoiser, name, device_type, precision)
            able.append(name)
        except ConfigError as error:
            refused.append(str(error).removeprefix("model.attention: "))
    attention = Attention("auto", "fastest for each shape by measurement" + "".join(f"; {why}" for why in refused))
    denoiser.set_attn_processor(Fastest(able, attention, torch.cuda.get_device_name()))
    return attention


def _require(name: str, device_type: str, dtype: torch.dtype) -> None:
    if name == "flash" and device_type == "cuda" and dtype == torch.float32:
        raise ConfigError("model.attention: flash needs bf16 on a GPU; set train.precision=bf16, or use sdpa")
    if name == "cudnn" and dtype == torch.float32:
        raise ConfigError("model.attention: cudnn needs bf16; set train.precision=bf16, or use sdpa")
    if name in ("cudnn", "xformers") and device_type != "cuda":
        raise ConfigError(
            f"model.attention: {name} needs a CUDA device, and this run is on {device_type}; use model.attention=auto"
        )
    if name == "xformers" and (problem := xformers_problem()):
        raise ConfigError(f"model.attention: {problem}, or use model.attention=auto")


@cache
def xformers_problem() -> str | None:
    """Why xformers cannot be used here, with a remedy; None where it loads. It is tried once a process."""
    if find_spec("xformers") is None:
        return "xformers is not installed; pip install 'dbtrain[gpu]'"
    try:
        import xformers.ops  # noqa: F401
    except Exception as error:  # a binary that does not fit raises errors of many kinds
        why = f"{type(error).__name__}: {first_line(error)}"
        return f"xformers is installed but does not load ({why}); uninstall it, or install a build for this torch"
    return None


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
"""Choices that are one backend of PyTorch's SDPA."""


@cache
def limited_to(kind: Any, name: str) -> Any:
    """A class of processors that calls PyTorch's SDPA as `kind` does, with one of its backends allowed and no other."""

    class OneBackend(kind):
        own = kind

        @wraps(kind.__call__)  # diffusers hands a processor the arguments that its signature names
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with sdpa_kernel(BACKENDS[name]):
                return super().__call__(*args, **kwargs)

    return OneBackend


@cache
def processor_of(name: str) -> Any:
    """The diffusers processor of a U-Net that asks for an implementation; one object serves all layers."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

    if name in ("flash", "cudnn"):
        return limited_to(AttnProcessor2_0, name)()
    return {"sdpa": AttnProcessor2_0, "math": AttnProcessor, "xformers": XFormersAttnProcessor}[name]()


@cache
def exchangeable() -> tuple[type, ...]:
    """The processors that stand in for each other."""
    return (*(type(processor_of(name)) for name in ("sdpa", "math", "xformers")), Fastest)


class Ran(TorchDispatchMode):
    """Collects in `kernels` who computed the attention inside the block: flash, efficient, cudnn, xformers, math."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.kernels.update([kernel for part, kernel in KERNELS if part in name][:1])
        return func(*args, **(kwargs or {}))


def attention_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Every module that has an attention processor, by its path."""
    return {path: module for path, module in denoiser.named_modules() if hasattr(module, "processor")}


def prove(denoiser: nn.Module, name: str, device_type: str, dtype: torch.dtype) -> set[str]:
    """The kernels that ran in one small call of every kind of layer; raises ConfigError where others than asked did."""
    kinds: dict[tuple, nn.Module] = {}
    for layer in attention_layers(denoiser).values():
        sides = (layer.heads, layer.to_q.in_features, layer.to_k.in_features, layer.is_cross_attention)
        kinds.setdefault((*sides, type(layer.processor)), layer)
    found: set[str] = set()
    for layer in kinds.values():
        ran = _ran_in(layer, name, device_type, dtype)
        if not ran or ran - MAY_RUN[name]:
            raise ConfigError(
                f"model.attention: asked for {name}, but {' and '.join(sorted(ran)) or 'no known kernel'} runs in "
                f"{type(layer.processor).__name__} at {layer.heads} heads; choose another one, or model.attention=auto"
            )
        found |= ran
    return found


def _ran_in(layer: nn.Module, name: str, device_type: str, dtype: torch.dtype) -> set[str]:
    weight = layer.to_q.weight
    x = torch.zeros(1, 16, layer.to_q.in_features, device=weight.device, dtype=weight.dtype)
    told = x.new_zeros(1, 16, layer.to_k.in_features) if layer.is_cross_attention else None
    autocast = torch.autocast(device_type, dtype) if dtype != weight.dtype else nullcontext()
    width = layer.to_q.out_features // layer.heads
    what = f"{name} cannot run {layer.heads} heads of {width} in {dtype} on {device_type}"
    with explained(what), torch.no_grad(), autocast, Ran() as ran:
        layer(x, encoder_hidden_states=told)
    return ran.kernels


@contextmanager
def explained(what: str, *signs: str) -> Iterator[None]:
    """Raise ConfigError with a library's own reasons where it cannot do what it should. signs: of its error, one of
    which must be in the text; none where any error is meant."""
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        try:
            yield
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if signs and not any(sign in str(error) for sign in signs):
                raise
            why = "; ".join(str(one.message) for one in reasons) or first_line(error)
            raise ConfigError(f"model.attention: {what}: {why}; use model.attention=auto") from error


class Fastest:
    """A processor that runs, for each shape, the implementation that a short measurement found fastest there.

    A shape is measured when it is first met, which must not be inside a CUDA graph's capture or a compiled region: let
    a step run first. Steps are alike in bits only if their choices are; a fixed name makes sure of it.
    """

    def __init__(self, names: list[str], attention: Attention, device: str = "cpu"):
        """device: the name of the denoiser's device, under which measured times are kept."""
        self.names, self.attention, self.device = names, attention, device
        # Looked up here, because torch.compile would break the graph of every layer at the class in `processor_of`.
        self.processors = {name: processor_of(name) for name in names}

    def __call__(self, layer: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *a, **k):
        """The layer's output."""
        shape = _shape(self.device, layer, hidden_states, encoder_hidden_states)
        name = self.attention.shapes.get(shape)
        if name is None:
            name = self.attention.shapes[shape] = fastest(self.names, shape)
        return self.processors[name](layer, hidden_states, encoder_hidden_states, *a, **k)


def _shape(device: str, layer: nn.Module, x: Tensor, told: Tensor | None) -> Shape:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    tokens = x.shape[1] if x.dim() == 3 else x[0, 0].numel()
    keys, width = tokens if told is None else told.shape[1], layer.to_q.out_features // layer.heads
    return Shape(device, str(dtype).removeprefix("torch."), len(x), layer.heads, tokens, keys, width)


def fastest(names: list[str], shape: Shape) -> str:
    """The name with the smallest median time of forward and backward at a shape, kept in MEASURED."""
    if shape not in MEASURED:
        MEASURED[shape] = {name: measure(CORES[name], shape) for name in names}
    times = {name: MEASURED[shape].get(name, float("inf")) for name in names}
    return min(names, key=times.__getitem__)


def measure(core: Callable[[Tensor, Tensor, Tensor], Tensor], shape: Shape, warm: int = 3, turns: int = 10) -> float:
    """Median ms of one forward and backward of an attention of this shape, from and to a layer's own [B, T, H, D].

    It is called in the midst of a layer's forward, whose checkpointing must not take our tensors for the layer's.
    """
    device = "cpu" if shape.device == "cpu" else "cuda"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    sides = (shape.queries, shape.keys, shape.keys)
    dtype, each = getattr(torch, shape.dtype), (shape.heads, shape.width)
    taken_ms = []
    apart = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with apart, torch.enable_grad(), torch.autocast(device, enabled=False):
        q, k, v = (torch.randn(shape.batch, n, *each, device=device, dtype=dtype, requires_grad=True) for n in sides)
        cotangent = torch.randn_like(q)
        for turn in range(warm + turns):
            wait()
            begin = time.perf_counter()
            torch.autograd.grad(core(q, k, v), (q, k, v), cotangent)
            wait()
            if turn >= warm:
                taken_ms.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(taken_ms)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _by_backend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(BACKENDS[name]):
        return _sdpa(q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As diffusers' processor does it: heads are merged into the batch, by a copy."""
    from xformers.ops import memory_efficient_attention

    batch, _, heads, _ = q.shape
    merged = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
    return memory_efficient_attention(*merged).unflatten(0, (batch, heads)).transpose(1, 2)


CORES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": _sdpa,
    **{name: partial(_by_backend, name) for name in ("flash", "cudnn")},
    "xformers": _xformers,
}
"""Attention of [B, T, H, D] tensors by each of `CANDIDATES`, as their processors compute it, for measurements."""
