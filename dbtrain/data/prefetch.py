"""Work done ahead of its consumer by threads, in order and in bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dbtrain.machine import cores

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None, depth: int | None = None
) -> Generator[Result, None, None]:
    """`map(work, items)`, in order, with at most `depth` + 1 results under way; None is one for each thread, and of
    threads one for each core, at most 8.

    Decoding and hashing release the interpreter lock, so threads suffice. An exception of `work` comes out in its
    item's turn.
    """
    threads = threads or min(cores(), 8)
    depth = depth or threads
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
