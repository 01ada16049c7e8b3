"""The contract of an engine, and the pure arithmetic that every engine shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from dbtrain.engines.world import World
from dbtrain.errors import ConfigError
from dbtrain.settings.config import EngineConfig, TrainConfig

EngineState = dict[str, dict[str, Tensor]]
"""fp32 tensors by kind (`master`, `exp_avg`, `exp_avg_sq`, `ema`) and parameter name, whole, whatever the sharding."""


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a peak learning rate, by their names in checkpoints."""

    params: dict[str, nn.Parameter]
    lr: float


@dataclass(frozen=True)
class BatchPlan:
    """How one step's instance samples are spread: batch = micro * accumulation * world."""

    batch: int
    micro: int
    accumulation: int

    def slots(self, world: World, turn: int) -> range:
        """Instance draw slots of a rank's forward pass number `turn` within a step."""
        first = (turn * world.size + world.rank) * self.micro
        return range(first, first + self.micro)


def plan_batches(batch: int, micro: int | None, world_size: int) -> BatchPlan:
    """The plan for a world; raises ConfigError when the global batch does not divide."""
    per_rank, rest = divmod(batch, world_size)
    if rest or per_rank == 0:
        raise ConfigError(
            f"train.batch: {batch} instance samples cannot be shared by {world_size} ranks; "
            f"use a multiple of {world_size}"
        )
    micro = micro or per_rank
    if per_rank % micro:
        raise ConfigError(
            f"train.micro_batch: {micro} does not divide the {per_rank} samples of each of {world_size} ranks"
        )
    return BatchPlan(batch, micro, per_rank // micro)


def lr_scale(step: int, config: TrainConfig, steps: int) -> float:
    """Share of the peak learning rate that optimizer step `step` (from 0) uses; never 0, so that every step counts."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
        config.schedule
    ]


class Engine(Protocol):
    """What a job reads of its engine, whichever it is. A subject that trains alone is row 0.

    How a step is made differs: `ZeroEngine` takes the gradient of each micro-batch and a rate for the step, and its
    ranks share one subject; `PackedEngine` updates all rows at once, from tensors that stay on the device.
    """

    def state(self, row: int = 0) -> EngineState:
        """Everything to resume a row's subject from, on the CPU of the first rank; other ranks get empty groups."""


def keeps_whole(settings: EngineConfig) -> bool:
    """Whether each rank has every weight whole, while the engine trains and after it is closed.

    Where it has not (ZeRO stage 3), all ranks must run the model together, and the base must be loaded anew afterwards.
    """
    return settings.kind == "packed" or settings.zero.stage < 3
