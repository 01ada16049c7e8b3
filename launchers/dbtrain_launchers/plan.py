"""What to start: a LaunchPlan, which each launcher turns into text for its program.

All functions here are pure, except `start_program` and `check_program`.
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
"""Names of partitions, hosts and log files. No program reads such a text as anything but a name."""
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The variable that names the GPUs which a process may use."""
MAX_WORDS_BYTES = 100_000
"""The limit of all words together, in bytes: below Linux's limit for one argument of a program (128 KiB)."""


@dataclass(frozen=True)
class LaunchPlan:
    """The words of a `dbtrain` command line, and the machines to run it on. `make_plan` checks both."""

    words: tuple[str, ...]
    """What follows `dbtrain`: `train ...` or `batch run ...`."""
    nodes: int = 1
    gpus: int = 0
    """GPUs of each node; 0: the launcher asks for none."""
    cpus: int = 0
    """CPU cores of each node; 0: the launcher's default."""
    name: str = "dbtrain"
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables that every process of the run gets. Most launchers store them in the clear."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES of this shell, for a run on this machine; None: not set, every GPU may be used."""

    @property
    def is_batch(self) -> bool:
        """Whether the run is a fleet (`batch run`), which starts its own processes by Ray."""
        return self.words[0] == "batch"

    @property
    def cluster_words(self) -> tuple[str, ...]:
        """The words for a process inside a Ray cluster. A fleet uses that cluster if the words name no other."""
        if not self.is_batch or any(word.split("=")[0] == "--address" for word in self.words):
            return self.words
        return (*self.words[:2], "--address", "auto", *self.words[2:])

    @property
    def ranks(self) -> int:
        """Processes of `train` on each node."""
        return max(self.gpus, 1)


@dataclass(frozen=True)
class Rendered:
    """The exact command, and the exact text of its standard input ("": none)."""

    command: tuple[str, ...]
    stdin: str = ""

    @property
    def text(self) -> str:
        """The text that `--dry-run` prints: the script, manifest or request; without one, the command line."""
        return self.stdin or shlex.join(self.command) + "\n"


@dataclass(frozen=True)
class Launcher:
    """A row of `LAUNCHERS`."""

    render: Callable[..., Rendered]
    """From a plan and the launcher's own options, which are its keyword arguments. Pure. Its docstring is the help."""
    machines: tuple[str, ...]
    """The fields that it uses, of the plan's `nodes`, `gpus`, `cpus`, `name`: only these are options of its verb."""
    start: Callable[[Rendered], int]
    """Start what was rendered, and return the exit code. Raises FleetError if that is impossible or unsafe."""


def make_plan(words: Sequence[str], env: Sequence[str] = (), visible: str | None = None, **machines: Any) -> LaunchPlan:
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
    """Why words cannot be launched; empty if they can."""
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
    """Whether UTF-8 can encode a value. Python turns bytes of a command line that are not UTF-8 into surrogates."""
    return not any("\ud800" <= sign <= "\udfff" for sign in value)


def env_findings(entries: Sequence[str]) -> list[str]:
    """Why NAME=VALUE entries cannot be passed on; empty if they can."""
    findings = []
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not ENV_NAME.fullmatch(name):
            findings.append(f"--env {name!r}: want NAME=VALUE with a name of letters, digits and _")
        elif "\0" in value or not is_text(value):
            findings.append(f"--env {name}: the value holds a NUL character or bytes that are not UTF-8")
        elif secret_words([entry], names=True):
            findings.append(
                f"--env {name}: looks like a secret, which launchers store and show in the clear; let the "
                "run read it from a file (0600) or a cluster's secret store"
            )
    return findings


def plain_findings(**options: str | None) -> list[str]:
    """A finding for each option whose value is not a plain name. None: the option was not given."""
    return form_findings(PLAIN, "letters, digits and _.,:@%+=/-, not - first", **options)


def form_findings(form: re.Pattern[str], want: str, **options: str | Sequence[str] | None) -> list[str]:
    """A finding for each value of an option that has not this form. None: the option was not given."""
    return [
        f"--{name.replace('_', '-')}: got {value!r}, want {want}"
        for name, given in options.items()
        for value in ([given] if isinstance(given, str) else given or ())
        if not form.fullmatch(value)
    ]


def assigned_gpu_findings(plan: LaunchPlan, cluster: str) -> list[str]:
    """A finding if `--env` names GPUs where a cluster assigns them to processes and sets the variable itself."""
    if VISIBLE not in plan.env:
        return []
    return [f"--env {VISIBLE}: {cluster} assigns the GPUs of this run and sets this variable itself; leave it out"]


def refuse(findings: Sequence[str]) -> None:
    """Raise ConfigError if there are findings."""
    if findings:
        raise ConfigError(list(findings))


def check_program(program: str, remedy: str) -> None:
    """Raise FleetError if a program is not on PATH."""
    if shutil.which(program) is None:
        raise FleetError(f"`{program}` is not found on PATH; {remedy}. `--dry-run` prints the text for another machine")


def start_program(rendered: Rendered) -> int:
    """Run a program with its text as standard input, and return its exit code; 128 + N if signal N ended it."""
    code = subprocess.run(rendered.command, input=rendered.stdin.encode(), check=False).returncode
    return code if code >= 0 else 128 - code
