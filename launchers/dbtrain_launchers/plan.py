"""What is to be started, apart from how: a LaunchPlan, which each launcher renders into text for its program.

Everything here is pure but `start_program` and `check_program`.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dbtrain.errors import ConfigError, FleetError
from dbtrain_launchers.exposure import secret_words

ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PLAIN = re.compile(r"[A-Za-z0-9%./_][A-Za-z0-9_.,:@%+=/-]*")
"""Names of partitions, hosts, files for logs: nothing that any program reads as more than a name."""
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The variable that names the GPUs which a process may use."""
MAX_WORDS_BYTES = 100_000
"""Less than one argument of a program may hold on Linux (128 KiB)."""


@dataclass(frozen=True)
class LaunchPlan:
    """The words of a `dbtrain` command line and the machines that it wants; already checked, see `make_plan`."""

    words: tuple[str, ...]
    """What follows `dbtrain`: `train ...` or `batch run ...`."""
    nodes: int = 1
    gpus: int = 0
    """GPUs of each node; 0 is a run on CPUs."""
    cpus: int = 0
    """CPU cores of each node; 0 leaves it to the launcher's default."""
    name: str = "dbtrain"
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables that every process of the run gets. Most launchers store them in the clear."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES of this shell, for a run on this machine; None: not set, every GPU may be used."""

    @property
    def is_batch(self) -> bool:
        """Whether the run is a fleet (`batch run`), which brings its own processes through Ray."""
        return self.words[0] == "batch"

    @property
    def cluster_words(self) -> tuple[str, ...]:
        """The words for a process inside a Ray cluster: a fleet uses that cluster, unless told otherwise."""
        if not self.is_batch or any(word.split("=")[0] == "--address" for word in self.words):
            return self.words
        return (*self.words[:2], "--address", "auto", *self.words[2:])

    @property
    def ranks(self) -> int:
        """Processes of `train` on each node."""
        return max(self.gpus, 1)


@dataclass(frozen=True)
class Rendered:
    """The exact command, and the exact text that it gets on standard input ("" is none)."""

    command: tuple[str, ...]
    stdin: str = ""

    @property
    def text(self) -> str:
        """What `--dry-run` prints: the script, manifest or request if there is one, else the command line."""
        return self.stdin or shlex.join(self.command) + "\n"


@dataclass(frozen=True)
class Launcher:
    """A row of `LAUNCHERS`."""

    render: Callable[..., Rendered]
    """From a plan and the launcher's own options, which are its keyword arguments; pure. Its docstring is the help."""
    machines: tuple[str, ...]
    """The fields of the plan that it passes on, of `nodes`, `gpus`, `cpus`, `name`; the others are no options of it."""
    start: Callable[[Rendered], int]
    """Starts what was rendered; the exit code. Raises FleetError where that is impossible or unsafe."""


def make_plan(
    words: Sequence[str], env: Sequence[str] = (), visible: str | None = None, **machines: Any
) -> LaunchPlan:
    """The plan of a command line.

    `env` holds NAME=VALUE; `visible` and `machines` are fields of the plan. Raises ConfigError with every finding at
    once.
    """
    words = tuple(words[1:] if words[:1] == ("dbtrain",) else words)
    findings = [*word_findings(words), *env_findings(env)]
    for name, least in (("nodes", 1), ("gpus", 0), ("cpus", 0)):
        if machines.get(name, least) < least:
            findings.append(f"--{name}: got {machines[name]}, want at least {least}")
    if not DNS_LABEL.fullmatch(machines.get("name", "dbtrain")):
        findings.append(f"--name: got {machines['name']!r}, want small letters, digits and inner dashes, at most 63")
    if findings:
        raise ConfigError(findings)
    return LaunchPlan(words, env=dict(entry.split("=", 1) for entry in env), visible=visible, **machines)


def word_findings(words: tuple[str, ...]) -> list[str]:
    """What keeps words from being launched."""
    if words[:1] != ("train",) and words[:2] != ("batch", "run"):
        return [f"-- {shlex.join(words[:2])}: only `train` and `batch run` are launched; put them after `--`"]
    if any("\0" in word or not is_text(word) for word in words):
        return ["the command line holds a NUL character or bytes that are not UTF-8"]
    if sum(len(word.encode()) + 1 for word in words) > MAX_WORDS_BYTES:
        return [f"the command line has over {MAX_WORDS_BYTES} bytes; move settings into a recipe file"]
    return [
        f"{shown}: looks like a secret, and command lines are stored in the clear; let the run read it from a file "
        "or from its own environment"
        for shown in secret_words(words)
    ]


def is_text(value: str) -> bool:
    """Whether UTF-8 can write a value; Python gives other bytes of a command line as lone surrogates."""
    return not any("\ud800" <= sign <= "\udfff" for sign in value)


def env_findings(entries: Sequence[str]) -> list[str]:
    """What keeps NAME=VALUE entries from being passed on."""
    found = []
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not ENV_NAME.fullmatch(name):
            found.append(f"--env {name!r}: want NAME=VALUE with a name of letters, digits and _")
        elif "\0" in value or not is_text(value):
            found.append(f"--env {name}: the value holds a NUL character or bytes that are not UTF-8")
        elif secret_words([entry], names=True):
            found.append(
                f"--env {name}: looks like a secret, which launchers store and show in the clear; let the "
                "run read it from a file (0600) or a cluster's secret store"
            )
    return found


def plain_findings(**options: str | None) -> list[str]:
    """A line for each option whose value is more than a plain name; None is an option that was not given."""
    return [
        f"--{name.replace('_', '-')}: got {value!r}, want letters, digits and _.,:@%+=/-, not - first"
        for name, value in options.items()
        if value is not None and not PLAIN.fullmatch(value)
    ]


def assigned_gpu_findings(plan: LaunchPlan, cluster: str) -> list[str]:
    """A finding if `--env` names GPUs where a cluster assigns them to processes and sets the variable itself."""
    if VISIBLE not in plan.env:
        return []
    return [f"--env {VISIBLE}: {cluster} assigns the GPUs of this run and sets this variable itself; leave it out"]


def refuse(findings: Sequence[str]) -> None:
    """Nothing; raises ConfigError when there are findings."""
    if findings:
        raise ConfigError(list(findings))


def check_program(program: str, remedy: str) -> None:
    """Nothing; raises FleetError when a program is not on PATH."""
    if shutil.which(program) is None:
        raise FleetError(f"`{program}` is not found on PATH; {remedy}. `--dry-run` prints the text for another machine")


def start_program(rendered: Rendered) -> int:
    """The exit code of a program that is given its text and writes where this process writes."""
    code = subprocess.run(rendered.command, input=rendered.stdin.encode(), check=False).returncode
    return code if code >= 0 else 128 - code
