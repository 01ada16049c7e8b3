"""What the fleet does with processes: die with a parent, find descendants, and a guard that cleans up after a driver.

Run as a program this module is that guard. It waits for the end of its standard input, which comes also when the writer
is killed, because the kernel closes the pipe; then it kills what still has files open in a folder, and removes that.
Ray's own agents were seen to outlive a killed driver by more than a minute.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""
QUIET_ROUNDS = 3
"""How often, 0.2 s apart, a guard must find nothing: what was just being started has its files open by then."""


def die_with_parent(parent: int) -> None:
    """Nothing; from now on the kernel kills this process when `parent`, the thread that started it, ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def born(pid: int) -> str:
    """When a process started, in clock ticks since boot: with the pid, a name that is never given twice; "" if gone."""
    fields = _stat(pid)
    return fields[19] if fields else ""


def parent_of(pid: int) -> int:
    """The process above another; 0 if that is gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def descendants(pid: int) -> dict[int, int]:
    """The living processes below `pid`, each with its parent."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = _stat(int(entry))
            if fields and fields[0] != "Z":
                parents[int(entry)] = int(fields[1])
    found: dict[int, int] = {}
    grown = True
    while grown:
        more = {child: parent for child, parent in parents.items() if parent == pid or parent in found}
        grown, found = len(more) > len(found), more
    return found


def kill(pid: int) -> None:
    """Nothing; afterwards the process is dead or dying, whatever state it was in."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def holders(folder: Path) -> list[int]:
    """The processes that have a file below `folder` open."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            files = Path(f"/proc/{entry}/fd").iterdir() if entry.isdigit() else ()
            if any(os.readlink(file).startswith(f"{folder}/") for file in files):
                found.append(int(entry))
    return found


def start_guard(folder: Path) -> subprocess.Popen:
    """A guard that, once this process is gone or releases it, kills all that still use `folder`, and removes it."""
    command = [sys.executable, "-S", str(Path(__file__).resolve()), str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def release(guard: subprocess.Popen) -> None:
    """Nothing; the guard has done its work and ended."""
    if guard.stdin is not None:
        guard.stdin.close()
    guard.wait()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (proc(5)): state, parent, ...; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _guard(folder: str) -> None:
    sys.stdin.read()
    quiet = 0
    while quiet < QUIET_ROUNDS:
        # The driver, where it lives on, is this process's parent.
        found = [pid for pid in holders(Path(folder)) if pid != os.getppid()]
        for pid in found:
            kill(pid)
        shutil.rmtree(folder, ignore_errors=True)
        quiet = 0 if found else quiet + 1
        time.sleep(0.2)


if __name__ == "__main__":
    _guard(sys.argv[1])
