"""Faults on order: what a process does to its files is counted, and the n-th operation is made to go wrong.

Nothing of this is in the program. A child process is patched (`os.replace`, `os.fsync`, `open`, `safetensors` ...), and
only what it does below one folder counts, so that the numbering is the same each time. Where several threads work, who
comes to the n-th may differ, and every operation is struck all the same. Actions:

- `kill`: SIGKILL just before the operation; a write is torn in the middle.
- `cut`: the same, and everything that was not yet synced to the disk is lost, as in a power cut.
- the name of an errno (`ENOSPC`, `EIO`, `EROFS`, `EACCES`): the operation raises it; a write has written half by then.
  With `forever`, so does every later operation of its kind, as on a full disk.
- `SIGTERM`, `SIGUSR1`: the process sends itself the signal there, and the operation is done.

Two ways to use it:

    ending = forked(work, Fault("kill", at=7), root)     # fork from this warm process, milliseconds each
    subprocess.run(command, env={**os.environ, **environment(Fault("kill", at=7), root)})   # any Python, Ray workers

`trace(work, root)` lists the operations of an undisturbed run. Damage to files at rest is in `damage.py`.
"""

import errno
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS = ("open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir")
VARIABLE = "FAULT_KIT"
"""Environment variable by which a child process is told its fault."""
SITE = Path(__file__).parent / "site"


@dataclass(frozen=True)
class Fault:
    """What goes wrong: the `at`-th operation (from 1) of these kinds below the watched folder; 0 is none."""

    action: str
    at: int
    kinds: tuple[str, ...] = KINDS
    forever: bool = False


@dataclass(frozen=True)
class Ending:
    """How a child ended: its exit code (negative: the signal), its operations as `kind path`, its standard error."""

    code: int
    operations: list[str]
    stderr: str


class Injector:
    """Counts the operations of this process below `root`, and strikes at the ordered one."""

    def __init__(self, fault: Fault | None, root: Path, log: Path | None = None):
        self.fault, self.root = fault, os.path.realpath(root)
        self.count, self.counting, self.unsynced = 0, threading.Lock(), set[str]()
        self.log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if log else None
        self.owner = os.getpid()
        self.real = {name: getattr(os, name) for name in ("open", "write", "kill", "truncate")}

    def watches(self, path: Any) -> str | None:
        """The path as text below the watched folder, or None if it lies elsewhere."""
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return None
        text = os.path.abspath(os.fsdecode(path))
        return text if text == self.root or text.startswith(self.root + "/") else None

    def due(self, kind: str, path: str) -> bool:
        """Count an operation; whether it is to go wrong."""
        if self.log is not None:
            self.real["write"](self.log, f"{kind} {os.path.relpath(path, self.root)}\n".encode())
        if self.fault is None or kind not in self.fault.kinds:
            return False
        with self.counting:
            self.count += 1
            return self.count == self.fault.at or (self.fault.forever and self.count > self.fault.at > 0)

    def strike(self, path: str) -> None:
        """The fault itself: the end of this process, or an OSError."""
        assert self.fault is not None
        if self.gentle:
            os.kill(os.getpid(), getattr(signal, self.fault.action))
            return
        if self.fault.action in ("kill", "cut"):
            if self.fault.action == "cut":
                for lost in tuple(self.unsynced):
                    if os.path.isfile(lost):
                        self.real["truncate"](lost, 0)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        number = getattr(errno, self.fault.action)
        raise OSError(number, os.strerror(number), path)

    @property
    def gentle(self) -> bool:
        """Whether the fault is a request that lets the operation happen."""
        return self.fault is not None and self.fault.action.startswith("SIG")

    def operation(self, kind: str, path: Any) -> None:
        """An operation is about to happen."""
        text = self.watches(path)
        if text is not None and self.due(kind, text):
            self.strike(text)

    def install(self) -> None:
        """Patch this process."""
        for name, kind in {"mkdir": "mkdir", "rmdir": "rmdir", "unlink": "unlink", "remove": "unlink"}.items():
            self._before(name, kind)
        for name in ("rename", "replace"):
            self._rename(name)
        self._fsync()
        self._open()
        if "torch" in sys.modules:
            self._safetensors()

    def _before(self, name: str, kind: str) -> None:
        real = getattr(os, name)

        def patched(path, *args, dir_fd=None, **named):
            place = path if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
            self.operation(kind, place)
            if dir_fd is not None:
                named["dir_fd"] = dir_fd
            return real(path, *args, **named)

        setattr(os, name, patched)

    def _rename(self, name: str) -> None:
        real = getattr(os, name)

        def patched(source, target, **named):
            self.operation("rename", target)
            real(source, target, **named)
            old, new = self.watches(source), self.watches(target)
            if old and new:
                moved = {path for path in self.unsynced if path == old or path.startswith(old + "/")}
                self.unsynced = (self.unsynced - moved) | {new + path[len(old) :] for path in moved}

        setattr(os, name, patched)

    def _fsync(self) -> None:
        real = os.fsync

        def patched(descriptor):
            self.operation("fsync", descriptor)
            real(descriptor)
            self.unsynced.discard(self.watches(descriptor) or "")

        os.fsync = patched

    def _open(self) -> None:
        injector, real = self, io.open

        class Raw(io.FileIO):
            """A file whose writes are operations."""

            def write(self, data):
                path = injector.watches(self.fileno())
                if path and injector.due("write", path):
                    if not injector.gentle:
                        super().write(memoryview(data)[: len(data) // 2])
                    injector.strike(path)
                return super().write(data)

        def patched(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            path = self.watches(file) if set("wax+") & set(mode) and not isinstance(file, int) else None
            if path is None:
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if not os.path.exists(path) or "w" in mode:
                self.operation("open", path)
            self.unsynced.add(path)
            raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            buffer = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline, buffering == 1)

        io.open = patched
        sys.modules["builtins"].open = patched

    def _safetensors(self) -> None:
        """safetensors writes from Rust: its whole file is one operation, torn in the middle."""
        import safetensors.torch as library

        real = library.serialize_file

        def patched(tensors, filename, *args, **named):
            path = self.watches(filename)
            due = path is not None and self.due("write", path)
            real(tensors, filename, *args, **named)
            if path:
                self.unsynced.add(path)
            if due and self.gentle:
                self.strike(path)
            elif due:
                self.real["truncate"](path, os.path.getsize(path) // 2)
                self.strike(path)

        library.serialize_file = patched


def forked(work: Callable[[], object], fault: Fault | None, root: Path, timeout: float = 240) -> Ending:
    """How a fork of this process ended that did `work` under a fault; it needs no imports of its own.

    Exit code 0: `work` returned. A DbtrainError, or a refusing disk, gives its exit code and its text as on the command
    line, another exception 1 and a traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder, "log"), Path(folder, "stderr")
        pid = os.fork()
        if pid == 0:
            _child(work, fault, root, log, errors)
        code = _wait(pid, timeout)
        operations = log.read_text().splitlines() if log.exists() else []
        return Ending(code, operations, errors.read_text() if errors.exists() else "")


def _child(work: Callable[[], object], fault: Fault | None, root: Path, log: Path, errors: Path) -> None:
    """Never returns."""
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        from dbtrain.errors import DataError, DbtrainError
        from dbtrain.storage.trouble import disk_trouble

        Injector(fault, root, log).install()
        try:
            work()
            code = 0
        except DbtrainError as error:
            os.write(2, f"error: {error}\n".encode())
            code = error.exit_code
        except Exception as error:
            trouble = disk_trouble(error)
            if trouble is None:
                raise
            os.write(2, f"error: {trouble}\n".encode())
            code = DataError.exit_code
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _wait(pid: int, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"the child was still at work after {timeout:g} s")


def trace(work: Callable[[], object], root: Path, timeout: float = 240) -> list[str]:
    """The operations, as `kind path`, of an undisturbed run of `work` in a fork."""
    ending = forked(work, None, root, timeout)
    assert ending.code == 0, ending.stderr
    return ending.operations


def environment(fault: Fault, root: Path, log: Path | None = None) -> dict[str, str]:
    """Variables that put a fault into any Python child process (and, as environments are inherited, its children).

    The first process that gets to the operation is struck; a process that begins later counts from its own start.
    """
    order = {"fault": asdict(fault), "root": str(root), "log": str(log) if log else None}
    paths = [str(SITE), str(SITE.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {VARIABLE: json.dumps(order), "PYTHONPATH": os.pathsep.join(paths)}


def install_from_environment() -> None:
    """Put in the fault that `environment` asked for; called by `site/sitecustomize.py` of a child."""
    text = os.environ.get(VARIABLE)
    if text:
        import torch  # noqa: F401  the child will need it anyway, and writes through safetensors

        order = json.loads(text)
        fault = Fault(**{**order["fault"], "kinds": tuple(order["fault"]["kinds"])})
        Injector(fault, Path(order["root"]), Path(order["log"]) if order["log"] else None).install()
