"""What subjects of a pack leave behind, written by a thread while the others train."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dbtrain.errors import DbtrainError
from dbtrain.training.job import Finished
from dbtrain.values import Subject


class Writer:
    """A thread that does what it is given, in order. most: entries that may wait for it.

    `finished` is called in the thread that calls `tell`, `write` or `tell_written`. ended: subjects it was called for.
    """

    def __init__(self, most: int, finished: Finished):
        self.most, self.finished = most, finished
        self.thread = ThreadPoolExecutor(1)
        self.waiting: deque[tuple[Subject | None, Future]] = deque()
        self.ended = 0

    @property
    def ending(self) -> int:
        """Subjects whose results are on their way to the disk; checkpoints on that way end no subject."""
        return sum(subject is not None for subject, _ in self.waiting)

    def write(self, subject: Subject | None, work: Callable[..., Any], *arguments: Any) -> None:
        """Queue work for the thread. subject: the one whose record `work` returns; None for work that ends no subject.

        The queue is bounded by waiting for its oldest entry.
        """
        self.waiting.append((subject, self.thread.submit(work, *arguments)))
        while len(self.waiting) > self.most:
            self._tell_oldest()

    def afterwards(self, work: Callable[[], Any]) -> None:
        """Let the thread do this after all that it was given before."""
        self.thread.submit(work)

    def tell_written(self, wait: bool = False) -> None:
        """Report the subjects whose results are on disk; with `wait`, all that are on their way. Raises what writing
        raised."""
        while self.waiting and (wait or self.waiting[0][1].done()):
            self._tell_oldest()

    def tell(self, subject: Subject, outcome: dict[str, Any] | DbtrainError) -> None:
        """Report a subject that has ended."""
        self.ended += 1
        self.finished(subject, outcome)

    def close(self) -> None:
        """Wait until all is written."""
        self.thread.shutdown(wait=True)

    def _tell_oldest(self) -> None:
        subject, written = self.waiting.popleft()
        outcome = written.result()
        if subject is not None:
            self.tell(subject, outcome)
