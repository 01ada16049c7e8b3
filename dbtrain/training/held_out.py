"""`train.stop`: training ends when the loss at fixed noise no longer falls, and the best weights are published.

Where a subject has enough photos, its last one is held out of training and watched; else all photos are watched. Noise
and timesteps of an observation are named by counters, so they are the same at every observation, alone and in a pack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dbtrain.settings.config import StopConfig
from dbtrain.training.trainables import BEST
from dbtrain.values import Batch, Role

if TYPE_CHECKING:
    from dbtrain.training.bank import Bank

FEWEST = 4
"""Photos of which one is held out; of fewer, each is needed for training."""
FIXED = 2**31 - 1
"""The step by which the noise of every observation is named. No training makes so many."""


def held_out(photos: int, stop: StopConfig) -> int:
    """Number of a subject's photos that training does not draw: its last one, or none."""
    return int(stop.metric == "loss" and photos >= FEWEST)


def fixed_samples(bank: Bank, slots: range) -> Batch:
    """The watched photos in turn, for these slots, as step FIXED has them. They must share a shape."""
    count = len(bank.items[Role.INSTANCE])
    first = count - bank.held if bank.held else 0
    slot_B = torch.tensor(slots)
    pick_B = first + slot_B % (count - first)
    (shape,) = {bank.shapes[pick] for pick in pick_B.tolist()}
    return bank.drawn(Role.INSTANCE, FIXED, slot_B, pick_B, shape)


def turns(samples: int, at_once: int) -> list[range]:
    """The slots of each forward pass of an observation, which are the same slots however many are run at once."""
    return [range(first, min(first + at_once, samples)) for first in range(0, samples, at_once)]


@dataclass
class Watched:
    """What was observed of one training so far. loss, step, weights: of the best observation. misses: observations
    since then. seen: all of them. last: the newest loss. ended: the step at which training ended early, if it did."""

    stop: StopConfig = field(default_factory=StopConfig)
    loss: float = math.inf
    step: int = 0
    misses: int = 0
    seen: int = 0
    last: float = math.nan
    weights: dict[str, Tensor] = field(default_factory=dict)
    ended: int | None = None

    def observe(self, step: int, loss: float, weights: Callable[[], dict[str, Tensor]]) -> bool:
        """Whether training is to end after this step. weights: gives those to publish as they are now."""
        self.last, self.seen, self.misses = loss, self.seen + 1, self.misses + 1
        if loss < self.loss:
            self.loss, self.step, self.misses, self.weights = loss, step, 0, weights()
        if self.misses >= self.stop.patience:
            self.ended = step
        return self.ended is not None

    @property
    def values(self) -> dict[str, float]:
        """What a log line says."""
        return {"loss_fixed": self.last} if self.seen else {}

    @property
    def text(self) -> str:
        """What to say of a training that ended early."""
        return f"ended after step {self.ended}: the loss at fixed noise was lowest after step {self.step}"

    @property
    def best(self) -> dict[str, dict[str, Tensor]]:
        """The weights as a part of an engine's state; empty where nothing was observed."""
        return {BEST: self.weights} if self.weights else {}

    def numbers(self) -> dict[str, float]:
        """What a checkpoint keeps beside the weights; empty where nothing was observed."""
        return {"loss": self.loss, "step": self.step, "misses": self.misses, "seen": self.seen} if self.seen else {}

    def restore(self, numbers: Mapping[str, float], weights: dict[str, Tensor]) -> None:
        """Go on from what a checkpoint kept."""
        if numbers:
            self.loss, self.weights = numbers["loss"], weights
            self.step, self.misses, self.seen = (int(numbers[name]) for name in ("step", "misses", "seen"))

    def told(self, held: int) -> dict[str, Any]:
        """What a record says, under `stop`; empty where nothing was observed. held: photos held out."""
        if not self.seen:
            return {}
        best = {"best_step": self.step, "best_loss": self.loss, "observations": self.seen}
        return {"stop": {"metric": self.stop.metric, "held_out": held, "early": self.ended is not None, **best}}
