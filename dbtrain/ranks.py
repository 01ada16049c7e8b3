"""What the ranks of a run settle together: one chooses for all, and what fails on one fails on all.

A network share may show each rank another state of it. Ranks that went on from different steps would mix their weights,
and one that gave up would be waited for without end. A world of one settles everything by itself, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dbtrain.engines.engine import World
from dbtrain.errors import DbtrainError

Value = TypeVar("Value")


def from_first(world: World, choose: Callable[[], Value]) -> Value:
    """What `choose` gives on the first rank, on every rank; its DbtrainError likewise. Others do not call it."""
    if world.size == 1:
        return choose()
    told: list[Any] = [_tried(choose) if world.first else None]
    dist.broadcast_object_list(told)
    value, error = told[0]
    if error is not None:
        raise error
    return value


def together(world: World, work: Callable[[], Value]) -> Value:
    """What `work` gives on this rank; where it fails on some, the first one's DbtrainError on every rank."""
    if world.size == 1:
        return work()
    value, error = _tried(work)
    errors: list[DbtrainError | None] = [None] * world.size
    dist.all_gather_object(errors, error)
    for met in errors:
        if met is not None:
            raise met
    return value


def _tried(work: Callable[[], Any]) -> tuple[Any, DbtrainError | None]:
    try:
        return work(), None
    except DbtrainError as error:
        return None, error
