"""A trainer: loads the base once, then works on one unit after another until it is asked to stop or dies.

It runs in a process of its own, forked by the warm parent. Whatever a subject does to this process (a crash, a
deadlock, all memory) ends with the process. It sends its messages to its worker over a pipe.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from dbtrain.errors import StopRequested
from dbtrain.fleet.causes import explain
from dbtrain.fleet.messages import Beat, Leaving, Order, Ready, Task, UnitDone
from dbtrain.settings.config import RunConfig

BEAT_S = 0.2
"""Shortest time between two messages that say no more than that the trainer is alive."""
STOPPED = 75
FAILED = 70


def run(link: Connection) -> None:
    """Work for a worker, and leave with exit code 75 after a stop request and 70 after a failure that was reported."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    task: Task = link.recv()
    os.environ.update(task.environment)
    code = 0
    try:
        _serve(link, task)
    except EOFError:
        pass
    except BaseException as error:
        traceback.print_exc()
        end = explain(error)
        code = STOPPED if end.cause == "stopped" else FAILED
        with contextlib.suppress(OSError):
            link.send(Leaving(end))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through atexit: a gang's process group would wait there for members that are dead.
    os._exit(code)


def _serve(link: Connection, task: Task) -> None:
    from dbtrain.fleet.work import WORK, measure_pack
    from dbtrain.models.load import base_digest
    from dbtrain.training.session import Watch, join_run

    send = _sender(link)
    watch = Watch(quiet=True, beat=_beat(send))
    base = join_run(RunConfig.model_validate(task.config), watch)
    for stage in (base, *base.upscalers):  # now, so that a base that cannot be loaded is no subject's fault
        stage.ready()
    send(Ready(base_digest(base.models), measure_pack(base, watch, task.measure) if task.measure else None))
    while True:
        while not link.poll(0.2):
            if watch.stop.asked:
                raise StopRequested("stopped on request between units")
        order: Order = pickle.loads(link.recv_bytes())  # noqa: S301 - from our own driver
        start = time.monotonic()
        WORK[order.unit.kind](base, watch, task, order, send)
        send(UnitDone(order.number, time.monotonic() - start))


def _sender(link: Connection) -> Callable[[Any], None]:
    """A function that several threads may send with: an engine may beat from a thread that writes."""
    lock = threading.Lock()

    def send(message: Any) -> None:
        with lock:
            link.send(message)

    return send


def _beat(send: Callable[[Any], None]) -> Callable[[str], None]:
    last = 0.0

    def beat(stage: str) -> None:
        nonlocal last
        if time.monotonic() - last > BEAT_S:
            last = time.monotonic()
            send(Beat(stage))

    return beat
