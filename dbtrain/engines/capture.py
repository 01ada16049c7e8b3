"""The captured step: a training step recorded once as a CUDA graph and replayed, or its repeated blocks compiled.

A step that launches thousands of small kernels spends its time in Python; a graph launches them all at once. It can be
recorded only where a step reads and writes the same tensors each time and never waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import nn

from dbtrain.batch import Batch
from dbtrain.config import EngineConfig
from dbtrain.errors import ConfigError, EngineError

Step = Callable[[Batch], None]
WARM_STEPS = 3
"""Real training steps that run one by one before the recording: kernels are compiled and libraries choose in them."""
REGIONS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Blocks that repeat in a U-Net: compiled by themselves, they are compiled once for each set of shapes."""


class Capture(NamedTuple):
    """How a step is run (`graph`, `compile` or `off`), why, and whether eager steps may take over where that fails."""

    mode: str
    reason: str
    may_fall_back: bool = False


def choose_capture(settings: EngineConfig, device_type: str) -> Capture:
    """What `engine.capture` comes to on a kind of device; raises ConfigError where it asks for what cannot be there."""
    choice, on_zero = settings.capture, settings.kind == "zero"
    if choice == "graph" and device_type != "cuda":
        raise ConfigError(
            f"engine.capture: graph needs a CUDA device, and this run is on {device_type}; use engine.capture=auto"
        )
    if choice != "auto":
        return Capture(choice, "asked for")
    if on_zero:
        return Capture("off", "auto: DeepSpeed's step runs Python and waits between its kernels")
    if device_type != "cuda":
        return Capture("off", f"auto: there are no CUDA graphs on {device_type}")
    return Capture("graph", "auto: a pack's step reads and writes the same tensors each time", may_fall_back=True)


def captured(step: Step, choice: Capture, denoiser: nn.Module) -> Step:
    """The step, run as chosen. Regions are compiled inside the denoiser, until `release`."""
    if choice.mode == "graph":
        return Recorded(step, choice.may_fall_back)
    if choice.mode == "compile":
        compile_regions(denoiser)
    return step


def compile_regions(denoiser: nn.Module, backend: str = "inductor") -> int:
    """The number of repeated blocks that are now compiled on their first call."""
    blocks = [block for block in denoiser.modules() if type(block).__name__ in REGIONS]
    for block in blocks:
        block.compile(dynamic=False, backend=backend)
    return len(blocks)


def release(denoiser: nn.Module) -> None:
    """Run every block as Python again."""
    for block in denoiser.modules():
        block._compiled_call_impl = None


class Recorded:
    """A step as a CUDA graph: WARM_STEPS real steps run as they are, the next is recorded, and from there on replayed.

    Recording executes nothing, so every call is one training step. Batches are copied into buffers that stay; one of
    other shapes than the first would need another graph and is an error. may_fall_back: where recording fails, warn and
    go on with steps as they are.
    """

    def __init__(self, step: Step, may_fall_back: bool = False):
        self.step, self.may_fall_back = step, may_fall_back
        self.warm, self.failed = 0, False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.buffers: Batch | None = None

    def __call__(self, batch: Batch) -> None:
        """One training step on a batch."""
        buffers = self._fill(batch)
        if self.graph is None and self.warm >= WARM_STEPS and not self.failed:
            self._record(buffers)
        if self.graph is not None:
            self.graph.replay()
        else:
            self._beside(buffers)
            self.warm += 1

    def _fill(self, batch: Batch) -> Batch:
        """The buffers, with a batch copied into them; no wait, since both are on the device."""
        if self.buffers is None:
            self.buffers = batch._map(torch.clone)
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

    def _beside(self, buffers: Batch) -> None:
        """A real step on a stream of its own, as recording wants of what comes before it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(buffers)
        torch.cuda.current_stream().wait_stream(stream)

    def _record(self, buffers: Batch) -> None:
        try:
            self._graph(buffers)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if not self.may_fall_back:
                raise EngineError(f"engine.capture: recording failed: {reason}; use engine.capture=off") from error
            message = f"engine.capture: auto runs steps one by one, because recording failed: {reason}"
            warnings.warn(message, stacklevel=3)
            self.failed = True

    def _graph(self, buffers: Batch) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads fill banks on the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.step(buffers)
        self.graph = graph
