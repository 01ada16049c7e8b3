"""What the fleet does with processes: die with a parent, know a process again, and clean up after a driver.

Run as a program this module is that guard. It waits for the end of its standard input, which comes also when the writer
is killed, because the kernel closes the pipe. Then it kills what still has files open in a folder, and removes the
folder. Ray's own agents were seen to outlive a killed driver by more than a minute.
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
    """Have the kernel kill this process when `parent`, or the thread of it that started this process, ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def born(pid: int) -> str:
    """When a process started, in clock ticks since boot, which with the pid names no other process; "" if it is gone.

    psutil gives this as a time of day, which changes with every correction of the clock.
    """
    try:
        # Field 22 of proc(5); those from the third on follow the command in brackets.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def kill(pid: int) -> None:
    """Kill a process, in whatever state it is; a process that is gone is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def holders(folder: Path) -> list[int]:
    """The processes that have a file below `folder` open, also one that is removed (psutil leaves those out)."""
    pids = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            files = Path(f"/proc/{entry}/fd").iterdir() if entry.isdigit() else ()
            if any(os.readlink(file).startswith(f"{folder}/") for file in files):
                pids.append(int(entry))
    return pids


def start_guard(folder: Path) -> subprocess.Popen:
    """A guard that, once this process is gone or releases it, kills all that still use `folder`, and removes it."""
    command = [sys.executable, "-S", str(Path(__file__).resolve()), str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def release(guard: subprocess.Popen) -> None:
    """Let the guard do its work now, and wait for its end."""
    if guard.stdin is not None:
        guard.stdin.close()
    guard.wait()


def _guard(folder: str) -> None:
    sys.stdin.read()
    quiet = 0
    while quiet < QUIET_ROUNDS:
        # The driver, if it is still alive, is this process's parent.
        pids = [pid for pid in holders(Path(folder)) if pid != os.getppid()]
        for pid in pids:
            kill(pid)
        shutil.rmtree(folder, ignore_errors=True)
        quiet = 0 if pids else quiet + 1
        time.sleep(0.2)


if __name__ == "__main__":
    _guard(sys.argv[1])
