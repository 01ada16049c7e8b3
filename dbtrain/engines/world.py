"""This process's place among the ranks, and what the ranks of a run settle together.

One rank chooses for all, and what fails on one rank fails on all. A network share may show each rank another state of
it: ranks that went on from different steps would mix their weights, and the others would wait without end for a rank
that gave up. A world of one settles everything by itself, at no cost."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dbtrain.errors import DbtrainError


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and its device ("cpu" or "cuda:i")."""

    rank: int
    size: int
    device: str

    @property
    def first(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""What carries messages between ranks, by the kind of their device."""


def start_world() -> World:
    """This process's world: the launcher's (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), else a world of one.

    A world of one uses an in-process store: no port is opened.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(local_rank)
    backend = BACKENDS[torch.device(device).type]
    if not dist.is_initialized():
        atexit.register(stop_world)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(dist.get_rank(), dist.get_world_size(), device)


def stop_world() -> None:
    """Leave the process group, so that the interpreter ends without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
