"""This process's place among the ranks, and how the ranks of a run agree.

One rank chooses for all, and what fails on one rank fails on all. A network share may show each rank another state of
its files. Ranks that went on from different steps would mix their weights, and if one rank gave up, the others would
wait for it without end. With one rank nothing is sent."""

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
    """The value that `choose` returns on the first rank, on every rank; its DbtrainError likewise. One message; other
    ranks do not call `choose`."""
    if world.size == 1:
        return choose()
    answer: list[Any] = [_tried(choose) if world.first else None]
    dist.broadcast_object_list(answer)
    value, error = answer[0]
    if error is not None:
        raise error
    return value


def together(world: World, work: Callable[[], Value]) -> Value:
    """The value that `work` returns on this rank. If it fails on some ranks, every rank raises the DbtrainError of the
    first of them."""
    if world.size == 1:
        return work()
    value, error = _tried(work)
    errors: list[DbtrainError | None] = [None] * world.size
    dist.all_gather_object(errors, error)
    for raised in errors:
        if raised is not None:
            raise raised
    return value


def _tried(work: Callable[[], Any]) -> tuple[Any, DbtrainError | None]:
    try:
        return work(), None
    except DbtrainError as error:
        return None, error
