"""A request to stop: SIGTERM, SIGUSR1, and Ctrl-C as it is pressed first. A second Ctrl-C ends the work at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from dbtrain.errors import StopRequested
from dbtrain.machine import in_main_thread, take_signals

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
NOTICE = b"\nstopping: the step under way is finished and saved; Ctrl-C again ends at once\n"


class Stop:
    """A request to stop. Long work looks at `asked` between its steps."""

    asked = False

    def ask(self, number: int | None = None, *_: object) -> None:
        """Ask the work to stop. number: the signal that asks, if one does. Raises KeyboardInterrupt for a Ctrl-C after
        an earlier request."""
        if number == signal.SIGINT:
            if self.asked:
                raise KeyboardInterrupt
            os.write(2, NOTICE)
        self.asked = True

    def listen(self) -> None:
        """Take signals to stop for the request from now on. In a thread, where Python takes none, change nothing."""
        take_signals(STOPS, self.ask)


def stop_now(*_: object) -> None:
    """Raise StopRequested: the answer to a signal during work whose every file appears whole or not at all."""
    raise StopRequested("stopped on request before training; run the same command to go on")


@contextmanager
def signals_as_before() -> Iterator[None]:
    """Give the signals to stop back to whoever had them, when the block ends: a notebook goes on after a training."""
    handlers = {number: signal.getsignal(number) for number in STOPS}
    try:
        yield
    finally:
        if in_main_thread():
            for number, handler in handlers.items():
                # None is a handler that was not set from Python, which Python cannot set again.
                if handler is not None:
                    signal.signal(number, handler)
