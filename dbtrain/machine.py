"""The part of its machine that this process may use. In a container or a job it is less than the whole machine."""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
VMSTAT = Path("/proc/vmstat")


def in_main_thread() -> bool:
    """Whether this is the main thread. Python lets no other set the handler of a signal."""
    return threading.current_thread() is threading.main_thread()


def take_signals(numbers: Sequence[int], action: Callable[..., object]) -> None:
    """Call `action` when one of these signals comes. Change nothing in a thread, and for signals that are ignored on
    purpose: a shell's background jobs and the fleet's trainers ignore Ctrl-C."""
    for number in numbers if in_main_thread() else ():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, action)


def cores() -> int:
    """Number of cores that this process may use: those it may run on, at most its cgroups' share of time (rounded up).

    With more threads than that, threads only wait for each other.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = []
    for text in cgroup_files("cpu.max"):
        quota, period = text.split()
        if quota != "max":
            limits.append(math.ceil(int(quota) / int(period)))
    return max(1, min([allowed, *limits]))


def cgroup_files(name: str) -> Iterator[str]:
    """The texts of a file in this process's cgroup (version 2) and in those above it, the nearest first.

    Cgroups without the file, such as the root, are passed over.
    """
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    for folder in [] if own is None else [CGROUPS / own, *(CGROUPS / own).parents]:
        if folder.is_relative_to(CGROUPS):
            try:
                yield (folder / name).read_text()
            except OSError:
                continue


def oom_kills() -> int:
    """Number of processes that the kernel has killed for lack of memory.

    Counted are those of this process's cgroup, also where the whole machine lacked memory. If the cgroup has no such
    counter, those of the whole machine are counted, of all users.
    """
    text = next(cgroup_files("memory.events"), None)
    if text is None:
        try:
            text = VMSTAT.read_text()
        except OSError:
            return 0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))
