"""Ranks as processes of their own, for what they settle together."""

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def on_ranks(size: int, work: Callable[..., Any], *words: Any) -> list[Any]:
    """What `work(world, *words)` returned on each rank, or the error it raised; `work` must be a module's function."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(size, maxtasksperchild=1) as pool:
        jobs = [(rank, size, str(Path(folder, "store")), work, words) for rank in range(size)]
        return pool.map_async(_rank, jobs, chunksize=1).get(240)


def _rank(job: tuple) -> Any:
    import torch.distributed as dist

    from dbtrain.engines.world import World
    from dbtrain.errors import DbtrainError

    rank, size, store, work, words = job
    whole = {"timeout": timedelta(seconds=120), "world_size": size, "rank": rank}
    dist.init_process_group("gloo", store=dist.FileStore(store, size), **whole)
    try:
        return work(World(rank, size, "cpu"), *words)
    except DbtrainError as error:
        return error
    finally:
        dist.destroy_process_group()
