"""Commands and ranks as processes that are forked, as a trainer is, from one that has imported everything.

They are processes like others: they have a pid, take signals, die alone, and say what they say to files. Only the
seconds of imports are spared, which most tests pay without a gain; `main_job.start` begins from nothing.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

from tests.kit.main_job import ROOT, ended, environment, heed_ctrl_c

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.kit.imported"])


def _begin(place: str, surroundings: dict[str, str], said: Path, work: Callable, arguments: Sequence) -> None:
    """What a forked process does first: its own folder, environment and output, signals as a shell gives them."""
    assert "tests.kit.imported" in sys.modules  # a server that cannot import it goes on without a word
    heed_ctrl_c()
    os.chdir(place)
    os.environ.clear()
    os.environ.update(surroundings)
    for stream in (1, 2):
        file = os.open(said / str(stream), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    work(*arguments)


def _command(words: list[str]) -> None:
    from dbtrain.cli import main

    main(words)


class Forked:
    """A process that does some work; the part of `subprocess.Popen` that tests use."""

    def __init__(self, work: Callable, *arguments: object, **variables: str):
        self.folder = tempfile.TemporaryDirectory(prefix="dbtrain-said-")
        self.said = Path(self.folder.name)
        surroundings = {**environment(), **variables}
        with chdir(ROOT):  # where Python 3.11 looks for what the server imports first
            forkserver.ensure_running()
        self.process = SERVER.Process(target=_begin, args=(os.getcwd(), surroundings, self.said, work, arguments))
        self.process.start()
        self.pid = self.process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(standard output, standard error), once the process has ended."""
        self.wait(timeout)
        return tuple((self.said / stream).read_text() for stream in "12")


def start(words: list) -> Forked:
    """`dbtrain WORDS`, under way."""
    return Forked(_command, [str(word) for word in words])


def dbtrain(words: list) -> SimpleNamespace:
    """`dbtrain WORDS` to its end, as `ended` tells it."""
    return ended(start(words))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks(count: int, work: Callable, *arguments: object) -> None:
    """Some work by so many ranks of one machine, as a launcher starts them, to its end."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [Forked(work, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(count)]
    for process in started:
        said = process.communicate(timeout=800)
        assert process.returncode == 0, said
