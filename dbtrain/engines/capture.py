"""The captured step: a training step recorded once as a CUDA graph and replayed, its repeated blocks compiled, or both.

A step that launches thousands of small kernels spends its time in Python; a graph launches them all at once. It can be
recorded only where a step reads and writes the same tensors each time and never waits for the device.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import nn

from dbtrain.engines.unit_scale import restore_unit_divisions
from dbtrain.errors import ConfigError, EngineError, first_line
from dbtrain.settings.config import EngineConfig
from dbtrain.values import Batch

Step = Callable[[Batch], None]
WARM_STEPS = 3
"""Real training steps that run one by one before the recording: kernels are compiled and libraries choose in them."""
GRAPHS = ("graph", "compiled_graph")
"""The choices that record a CUDA graph."""
SHAPES = 64
"""Most sets of shapes that a kind of block is compiled for. PyTorch's default is 8; SD1.5's residual blocks have 14."""


class Capture(NamedTuple):
    """How a step is run (a choice of `engine.capture` but for `auto`), why, and whether eager steps may take over where
    that fails."""

    mode: str
    reason: str
    may_fall_back: bool = False


def choose_capture(settings: EngineConfig, device_type: str) -> Capture:
    """What `engine.capture` comes to on a kind of device; raises ConfigError where it asks for what cannot be there."""
    choice, on_zero = settings.capture, settings.kind == "zero"
    if choice in GRAPHS and device_type != "cuda":
        raise ConfigError(
            f"engine.capture: {choice} needs a CUDA device, and this run is on {device_type}; use engine.capture=auto"
        )
    if choice != "auto":
        return Capture(choice, "asked for")
    if on_zero:
        return Capture("off", "auto: DeepSpeed's step runs Python and waits between its kernels")
    if device_type != "cuda":
        return Capture("off", f"auto: there are no CUDA graphs on {device_type}")
    return Capture("graph", "auto: a pack's step reads and writes the same tensors each time", may_fall_back=True)


def make_runner(choice: Capture, denoiser: nn.Module, regions: Sequence[str]) -> Eager:
    """What runs the steps of a denoiser, as chosen."""
    inner = Compiled(choice, denoiser, regions) if choice.mode.startswith("compile") else Eager(choice)
    return Recorded(inner) if choice.mode in GRAPHS else inner


def steps_to_warm(mode: str) -> int:
    """Steps after which a runner of a mode does what it will do for good."""
    return WARM_STEPS + 1 if mode in GRAPHS else {"compile": 2}.get(mode, 1)


def compile_regions(denoiser: nn.Module, regions: Sequence[str], backend: str = "inductor") -> int:
    """The number of repeated blocks that are now compiled on their first call, until `release`.

    Let one step run before: attention that is chosen by measurement is measured where a shape is first met.
    """
    more = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        more["recompile_limit"] = SHAPES
    else:  # before PyTorch 2.13 it was a setting of the process alone, with the same default of 8
        torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    blocks = [block for block in denoiser.modules() if type(block).__name__ in regions]
    for block in blocks:
        restore_unit_divisions(block)
        block.compile(dynamic=False, backend=backend, **more)
    return len(blocks)


def release(denoiser: nn.Module) -> None:
    """Run every block as Python again."""
    for block in denoiser.modules():
        block._compiled_call_impl = None


@contextmanager
def as_python(denoiser: nn.Module) -> Iterator[None]:
    """Compiled blocks run as Python within: pictures are drawn in other shapes and rows than steps are made."""
    compiled = {block: block._compiled_call_impl for block in denoiser.modules()}
    release(denoiser)
    try:
        yield
    finally:
        for block, was in compiled.items():
            block._compiled_call_impl = was


class Eager:
    """Runs a step as it is. choice: how steps are run, and why."""

    def __init__(self, choice: Capture):
        self.choice = choice

    def __call__(self, step: Step, batch: Batch) -> None:
        """One training step on a batch."""
        step(batch)


class Compiled(Eager):
    """Runs the first step as it is, and from there on with the denoiser's regions compiled."""

    def __init__(self, choice: Capture, denoiser: nn.Module, regions: Sequence[str]):
        super().__init__(choice)
        self.denoiser: nn.Module | None = denoiser
        self.regions = regions

    def __call__(self, step: Step, batch: Batch) -> None:
        """One training step on a batch."""
        step(batch)
        if self.denoiser is not None:
            compile_regions(self.denoiser, self.regions)
            self.denoiser = None


class Recorded(Eager):
    """A step as a CUDA graph: WARM_STEPS real steps run by `inner`, the next is recorded, and from there on replayed.

    With a `Compiled` inner runner the graph holds compiled blocks. Recording executes nothing, so every call is
    one training step. Batches are copied into buffers that stay; one of other shapes than the first would need another
    graph and is an error. Where recording fails and eager steps may take over, they do, with a warning, and `choice`
    says so.
    """

    def __init__(self, inner: Eager):
        super().__init__(inner.choice)
        self.inner = inner
        self.warm = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.buffers: Batch | None = None
        self.stream: torch.cuda.Stream | None = None

    def __call__(self, step: Step, batch: Batch) -> None:
        """One training step on a batch."""
        buffers = self._fill(batch)
        if self.graph is None and self.warm >= WARM_STEPS and self.choice.mode in GRAPHS:
            self._record(step, buffers)
        if self.graph is not None:
            self.graph.replay()
        else:
            self._beside(step, buffers)
            self.warm += 1

    def _fill(self, batch: Batch) -> Batch:
        """The buffers, with a batch copied into them; no wait, since both are on the device."""
        if self.buffers is None:
            self.buffers = batch.map(torch.clone)
            return self.buffers
        for name in (field.name for field in fields(batch)):
            buffer, value = getattr(self.buffers, name), getattr(batch, name)
            if buffer is None and value is None:
                continue
            if buffer is None or value is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                raise EngineError(
                    f"engine.capture: a batch's {name} differs from the recorded step's in shape or type; "
                    "set engine.capture=off for steps of changing shapes"
                )
            buffer.copy_(value, non_blocking=True)
        return self.buffers

    def _beside(self, step: Step, buffers: Batch) -> None:
        """A real step on a stream of its own, as recording wants of what comes before it."""
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.inner(step, buffers)
        torch.cuda.current_stream().wait_stream(self.stream)

    def _record(self, step: Step, buffers: Batch) -> None:
        try:
            self._graph(step, buffers)
        except torch.OutOfMemoryError:  # says nothing of the step: a smaller pack may be recorded
            raise
        except RuntimeError as error:
            reason = first_line(error)
            if not self.choice.may_fall_back:
                raise EngineError(f"engine.capture: recording failed: {reason}; use engine.capture=off") from error
            message = f"engine.capture: auto runs steps one by one, because recording failed: {reason}"
            warnings.warn(message, stacklevel=3)
            self.choice = Capture("off", f"auto: recording failed: {reason}")

    def _graph(self, step: Step, buffers: Batch) -> None:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads fill banks on the device meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.inner(step, buffers)
        finally:
            # PyTorch stays on the stream of a recording whose end fails.
            torch.cuda.set_stream(before)
        self.graph = graph
