"""Poison for trainers: put this folder on PYTHONPATH, and subjects fail by their names' first words.

`crash-x` aborts its process, `once-x` only the first time, `kill-x` is killed from outside, `hang-x` never makes a
step, `oom-x` runs out of memory, `nan-x` cannot go on, `bug-x` meets an error that nobody expected, `disk-x` finds the
disk full, `file-x` one of its files unreadable, `hold-x` waits while there is a file OUT/hold, and says so by OUT/held.
`index-x` trains, but nobody can evaluate it; with `wait-x` evaluation waits as `hold-x` does.
"""

import os
import signal
import sys
import time


def fail(error):
    raise error


def hold(session):
    while (session.out / "hold").exists() and not session.stop:
        (session.out / "held").touch()
        session.beat("hold")
        time.sleep(0.05)


def once(session):
    if not (session.out / "once").exists():
        (session.out / "once").touch()
        os.abort()


def poison(open_job):
    from dbtrain.errors import EngineError

    ways = {
        "crash": lambda session: os.abort(),
        "once": once,
        "kill": lambda session: os.kill(os.getpid(), signal.SIGKILL),
        "hang": lambda session: time.sleep(1e6),
        "oom": lambda session: fail(MemoryError()),
        "nan": lambda session: fail(EngineError("step 1: the loss is nan")),
        "bug": lambda session: fail(ZeroDivisionError("one by nought")),
        "file": lambda session: fail(OSError(5, "Input/output error", "a.png")),
        "disk": lambda session: fail(OSError(28, "No space left on device")),
        "hold": hold,
    }

    def poisoned(session, subject):
        ways.get(subject.id.split("-")[0], lambda session: None)(session)
        return open_job(session, subject)

    return poisoned


def poison_after(work):
    ways = {"index": lambda session: fail(IndexError("list index out of range")), "wait": hold}

    def poisoned(session, folder, task):
        ways.get(folder.name.split("-")[0], lambda session: None)(session)
        return work(session, folder, task)

    return poisoned


if "dbtrain.fleet.warm_parent" in sys.orig_argv:
    import dbtrain.fleet.work as work
    import dbtrain.packing.loop as pack
    import dbtrain.train as solo

    solo.open_job = pack.open_job = poison(solo.open_job)
    work.AFTER["evaluate"] = poison_after(work.AFTER["evaluate"])
