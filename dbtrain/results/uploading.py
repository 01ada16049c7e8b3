"""Uploads of finished subjects while training goes on: threads at the edge of a run, and what is left when it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from queue import Queue

from dbtrain.errors import ConfigError, DataError, DbtrainError, StopRequested, first_line
from dbtrain.results.upload import copy_at, upload
from dbtrain.settings.config import PublishConfig

THREADS = 4
PAUSES_S = (1.0, 5.0)
"""Seconds between the tries of one upload."""
DOWN = 2 * THREADS
"""Failures in a row after which the store is taken to be down: an upload is tried once, and none at a run's end."""
LINE_S = 10.0
"""Seconds between lines while the end of a run waits."""


def refuse_address(publish: PublishConfig) -> None:
    """Raise ConfigError for an address to publish to that cannot be used. No store is asked."""
    if publish.to is not None:
        copy_at(publish.to)


class Uploads:
    """The uploads of a run to `url`; None uploads nothing. say: prints a line.

    The threads are daemons: an upload is cut off where the process ends, and the same command completes it.
    failed: the errors of the subjects that are not there, by id.
    """

    def __init__(self, url: str | None, say: Callable[[str], None]):
        self.url, self.say = url, say
        self.queue: Queue[Path] = Queue()
        self.folders: dict[str, Path] = {}
        self.open: set[str] = set()
        self.failed: dict[str, DbtrainError] = {}
        self.gone: set[str] = set()
        self.failures, self.ending = 0, False
        self.changed = threading.Condition()
        for _ in range(THREADS if url else 0):
            threading.Thread(target=self._work, name="upload", daemon=True).start()

    def add(self, folders: Iterable[Path]) -> None:
        """Upload folders of finished subjects, soon."""
        for folder in folders if self.url else ():
            with self.changed:
                self.folders[folder.name] = folder
                self.open.add(folder.name)
                self.failed.pop(folder.name, None)
            self.queue.put(folder)

    def leave(self, names: Collection[str]) -> None:
        """Upload these subjects no more, and wait until none of their uploads is under way."""
        with self.changed:
            self.gone |= {*names}
            for name in names:
                self.folders.pop(name, None)
                self.failed.pop(name, None)
            while self.open & self.gone:
                self.changed.wait(0.2)

    def finish(self, stopped: Callable[[], bool] = lambda: False) -> dict[str, DbtrainError]:
        """The errors of the subjects that are not at the address, after all uploads have ended. What failed is tried
        again, as the store may be back; one that is down is not waited for.

        Raises StopRequested as soon as `stopped` says so.
        """
        self.ending, self.failures, told = True, 0, time.monotonic()
        self.add([self.folders[name] for name in list(self.failed)])
        with self.changed:
            while self.open:
                if stopped():
                    raise StopRequested(f"stopped on request{self.left}; run the same command to go on")
                if time.monotonic() - told > LINE_S:
                    told = time.monotonic()
                    self.say(f"waiting{self.left}")
                self.changed.wait(0.2)
        return self.failed

    @property
    def left(self) -> str:
        """How much is not there, as a part of a sentence; empty if nothing is left."""
        number = len(self.open) + len(self.failed)
        return f", {number} finished results are not at {self.url} yet" if number else ""

    def _work(self) -> None:
        while True:
            folder = self.queue.get()
            error = None if folder.name in self.gone else self._upload(folder)
            with self.changed:
                self.open.discard(folder.name)
                if error is not None and folder.name not in self.gone:
                    self.failed[folder.name] = error
                self.changed.notify_all()

    def _upload(self, folder: Path) -> DbtrainError | None:
        """What kept a subject from being uploaded, by the last try; None if nothing did."""
        reason = "the store is down"
        for pause_s in (*PAUSES_S, None):
            if self.failures >= DOWN and self.ending:
                break
            try:
                if upload(folder, str(self.url)):
                    self.say(f"{folder.name}: uploaded to {self.url}")
                self.failures = 0
                return None
            except Exception as error:
                reason = first_line(error)
                if not isinstance(error, DbtrainError):
                    reason = f"{type(error).__name__}: {reason}"
                if isinstance(error, ConfigError):
                    break
                self.failures += 1
                if pause_s is None or self.failures >= DOWN:
                    break
                time.sleep(pause_s)
        text = f"is finished here, and not yet at {self.url}: {reason}; the same command again uploads it"
        self.say(f"{folder.name}: {text}")
        return DataError(text)
