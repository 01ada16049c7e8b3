"""Poison for trainers: put this folder on PYTHONPATH, and subjects fail by their names' first words.

`crash-x` aborts its process, `once-x` only the first time, `kill-x` is killed from outside, `between-x` once, between
its two stages, `hang-x` never makes a
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


def hold(out, watch):
    while (out / "hold").exists() and not watch.stop.asked:
        (out / "held").touch()
        watch.beat("hold")
        time.sleep(0.05)


def once(out, watch):
    if not (out / "once").exists():
        (out / "once").touch()
        os.abort()


def between(out, watch):
    if [*out.glob("subjects/between-*/upscaler/record.json")] and not (out / "once").exists():
        (out / "once").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def poison(open_job):
    from dbtrain.errors import EngineError

    ways = {
        "crash": lambda out, watch: os.abort(),
        "once": once,
        "kill": lambda out, watch: os.kill(os.getpid(), signal.SIGKILL),
        "between": between,
        "hang": lambda out, watch: time.sleep(1e6),
        "oom": lambda out, watch: fail(MemoryError()),
        "nan": lambda out, watch: fail(EngineError("step 1: the loss is nan")),
        "bug": lambda out, watch: fail(ZeroDivisionError("one by nought")),
        "file": lambda out, watch: fail(OSError(5, "Input/output error", "a.png")),
        "disk": lambda out, watch: fail(OSError(28, "No space left on device")),
        "hold": hold,
    }

    def poisoned(base, work, watch, subject, *more):
        ways.get(subject.id.split("-")[0], lambda out, watch: None)(work.out, watch)
        return open_job(base, work, watch, subject, *more)

    return poisoned


def poison_after(work):
    ways = {"index": lambda out, watch: fail(IndexError("list index out of range")), "wait": hold}

    def poisoned(base, watch, folder, task):
        ways.get(folder.name.split("-")[0], lambda out, watch: None)(folder.parents[1], watch)
        return work(base, watch, folder, task)

    return poisoned


if "dbtrain.fleet.warm_parent" in sys.orig_argv:
    import dbtrain.fleet.work as work
    import dbtrain.packing.loop as pack
    import dbtrain.train as solo

    solo.open_job = pack.open_job = poison(solo.open_job)
    work.AFTER["evaluate"] = poison_after(work.AFTER["evaluate"])
