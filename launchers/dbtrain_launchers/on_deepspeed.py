"""`dbtrain train` under DeepSpeed's launcher: on this machine, over a hostfile by ssh, or once a node without ssh."""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dbtrain.errors import ConfigError
from dbtrain.fleet.processes import descendants
from dbtrain_launchers.plan import (
    Launcher,
    LaunchPlan,
    Rendered,
    check_program,
    plain_findings,
    refuse,
)

STOPS = (signal.SIGTERM, signal.SIGUSR1)
POLL_S = 0.2
"""Seconds between looks at a request to stop."""
_THROUGH_A_SHELL = re.compile(r"[A-Za-z0-9_@+=:./-][A-Za-z0-9_@+=:./ -]*")
_HOST_LINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\s+slots=\d+\s*(#.*)?|\s*(#.*)?")


def render(
    plan: LaunchPlan,
    *,
    hostfile: Annotated[Path | None, typer.Option(help="Lines of `HOST slots=N`; without it, this machine.")] = None,
    master_addr: Annotated[str | None, typer.Option(help="Address of the first node.")] = None,
    master_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the first node.")] = None,
    ssh_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the nodes' sshd.")] = None,
    no_ssh: Annotated[bool, typer.Option("--no-ssh", help="Start this node only; run it on every node.")] = False,
    node_rank: Annotated[int | None, typer.Option(min=0, help="With --no-ssh: which line of the hostfile.")] = None,
) -> Rendered:
    """Train with ZeRO on one machine, or on every host of a hostfile.

    \b
    Example:
      dbtrain launch deepspeed --gpus 8 -- train photos.csv --subjects all --config sdxl_full_zero3 --out runs/all
      dbtrain launch deepspeed --hostfile hosts -- train /nfs/a.csv --subjects all --config sdxl_full_zero3 --out /nfs/a
      dbtrain launch deepspeed --hostfile hosts --no-ssh --node-rank 1 --master-addr 10.0.0.1 -- train ...
    """
    findings = plain_findings(master_addr=master_addr)
    if plan.is_batch:
        findings.append("-- batch run: brings its own processes; start it with `launch ray`, `slurm` or `kubernetes`")
    if no_ssh and (hostfile is None or node_rank is None or master_addr is None):
        findings.append("--no-ssh: needs --hostfile, --node-rank and --master-addr, the same ones on every node")
    if plan.nodes > 1 and hostfile is None:
        findings.append(f"--nodes {plan.nodes}: needs --hostfile with the nodes' names")
    if hostfile is not None and not no_ssh:
        findings += remote_findings(plan)
    refuse(findings)
    options = {
        "hostfile": hostfile,
        "num_nodes": plan.nodes if plan.nodes > 1 else None,
        "num_gpus": plan.gpus or None,
        "master_addr": master_addr,
        "master_port": master_port,
        "ssh_port": ssh_port,
        "node_rank": node_rank,
    }
    given = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    command = ["deepspeed", *given, *(["--no_ssh"] if no_ssh else []), "--module", "dbtrain_launchers", *plan.words]
    variables = [f"{name}={value}" for name, value in plan.env.items()]
    return Rendered(tuple(["env", *variables, *command] if variables else command))


def remote_findings(plan: LaunchPlan) -> list[str]:
    """What DeepSpeed cannot pass through pdsh: it hands words to the remote shell with no or weak quotes.

    DeepSpeed 0.19 leaves words without spaces bare and puts double quotes around the others
    (`launcher/multinode_runner.py`), so `$(...)` in a prompt would run on every host.
    """
    instead = "move it into the recipe, or start each node with --no-ssh"
    found = [
        f"{word!r}: cannot go through pdsh's remote shell; {instead}"
        for word in plan.words
        if not _THROUGH_A_SHELL.fullmatch(word) or (word.startswith("-") and " " in word)
    ]
    if plan.env:
        found.append("--env: ssh does not pass variables on; put them into the file `.deepspeed_env`, or use --no-ssh")
    return found


def start(rendered: Rendered) -> int:
    """DeepSpeed's exit code, which is that of a rank; 75 when asked to stop by TERM or USR1."""
    command = rendered.command
    check_program("deepspeed", "activate the environment that holds dbtrain")
    if "--hostfile" in command[: command.index("--module")]:
        refuse(hostfile_findings(Path(command[command.index("--hostfile") + 1])))
        if "--no_ssh" not in command:
            check_program("pdsh", "install pdsh, or start each node with --no-ssh")
            refuse(folder_findings(str(Path.cwd())))
    return start_ranks(command)


def start_ranks(command: Sequence[str]) -> int:
    """The exit code of DeepSpeed's launcher, while a request to stop goes to this machine's ranks and not to it.

    The launcher itself dies of USR1 and ends with 1 on TERM, whatever its ranks say. Ranks that it started by ssh on
    other machines are not reached, but they stop with the others: a request is agreed on at each step.
    """
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in STOPS}
    try:
        launcher = subprocess.Popen(command)
        while launcher.poll() is None:
            if asked:
                asked.clear()
                for rank in ranks_under(launcher.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(POLL_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode


def ranks_under(pid: int) -> list[int]:
    """Processes below a launcher that are ranks of ours."""
    found = []
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if b"dbtrain_launchers" in words and any(word.startswith(b"--local_rank") for word in words):
                if b"deepspeed.launcher.launch" not in words:
                    found.append(child)
    return found


def folder_findings(folder: str) -> list[str]:
    """What keeps DeepSpeed from handing a working folder's name to a remote shell: it writes `cd FOLDER;` bare."""
    if _THROUGH_A_SHELL.fullmatch(folder) and " " not in folder:
        return []
    return [f"{folder!r}: DeepSpeed hands this folder's name to remote shells; work in one without spaces and signs"]


def hostfile_findings(path: Path) -> list[str]:
    """Lines of a hostfile that are not `HOST slots=N`: DeepSpeed ignores a missing file and passes names to ssh."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the hostfile cannot be read: {error}") from None
    return [
        f"{path}:{number}: got {line!r}, want `HOST slots=N`"
        for number, line in enumerate(lines, 1)
        if not _HOST_LINE.fullmatch(line)
    ]


LAUNCHER = Launcher(render, start)
