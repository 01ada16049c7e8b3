"""`dbtrain train` under DeepSpeed's launcher: on this machine, over a hostfile by ssh, or once a node without ssh."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dbtrain.errors import ConfigError, FleetError
from dbtrain_launchers.plan import (
    VISIBLE,
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
REACH_S = 30.0
"""Seconds in which a rank must appear that can be asked to stop: starting one takes some."""
_THROUGH_A_SHELL = re.compile(r"[A-Za-z0-9_@+=:./-][A-Za-z0-9_@+=:./ -]*")
_NUMBER = re.compile(r"[0-9]+")
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
      dbtrain launch deepspeed --gpus 4 -- train photos.csv --subjects all --config sdxl_full_zero3 --out runs/all
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
    visible = plan.env.get(VISIBLE, plan.visible)
    if visible is not None:
        findings += visible_findings(visible, plan.gpus, over_hosts=hostfile is not None)
    refuse(findings)
    named = None if visible is None or hostfile is not None else visible.split(",")[: plan.gpus or None]
    options = {
        "hostfile": hostfile,
        "num_nodes": plan.nodes if plan.nodes > 1 else None,
        "num_gpus": (plan.gpus or None) if named is None else None,
        "include": "localhost:" + ",".join(number.strip() for number in named) if named is not None else None,
        "master_addr": master_addr,
        "master_port": master_port,
        "ssh_port": ssh_port,
        "node_rank": node_rank,
    }
    given = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    command = ["deepspeed", *given, *(["--no_ssh"] if no_ssh else []), "--module", "dbtrain_launchers", *plan.words]
    # DeepSpeed would say that it ignores the variable, and count only the GPUs that the variable leaves.
    unset = ["-u", VISIBLE] if named is not None else []
    variables = [*unset, *(f"{name}={value}" for name, value in plan.env.items() if name != VISIBLE)]
    return Rendered(tuple(["env", *variables, *command] if variables else command))


def visible_findings(visible: str, gpus: int, over_hosts: bool) -> list[str]:
    """Why DeepSpeed cannot use just the GPUs that CUDA_VISIBLE_DEVICES names: `gpus` of them, or all for 0.

    DeepSpeed 0.19 writes this variable anew for its ranks (`launcher/launch.py`). On one machine, `--include` says
    which numbers the ranks get. On hosts of a hostfile they get 0, 1, ... up to the number of slots.
    """
    given, names = f"{VISIBLE}={visible}", [name.strip() for name in visible.split(",")]
    if names[0] in ("", "-1", "NoDevFiles"):
        return [f"{given}: hides all GPUs, but DeepSpeed would give its ranks GPU 0 and the next ones; unset it, or "
                "run `dbtrain train` without a launcher"]  # fmt: skip
    if not all(_NUMBER.fullmatch(name) for name in names):
        return [f"{given}: DeepSpeed takes GPUs by number only; name them by number, such as {VISIBLE}=1,3"]
    numbers = [int(name) for name in names]
    if len(set(numbers)) < len(numbers):
        return [f"{given}: names a GPU twice; name each one once"]
    if gpus > len(numbers):
        return [f"--gpus {gpus}: {given} names only {len(numbers)}; name more, or ask for fewer"]
    if over_hosts and (gpus == 0 or numbers[:gpus] != list(range(gpus))):
        return [f"{given}: DeepSpeed uses GPU 0 and the next ones of every host; unset it, and say with --gpus or by "
                "the slots of the hostfile how many"]  # fmt: skip
    return []


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


def start_ranks(command: Sequence[str], reach_s: float = REACH_S) -> int:
    """The exit code of DeepSpeed's launcher, while a request to stop goes to this machine's ranks and not to it.

    The launcher itself dies of USR1 and ends with 1 on TERM, whatever its ranks say. Ranks on other machines stop with
    this one's: a request is agreed on at each step. Raises FleetError if asked to stop while no rank is here.
    """
    asked: list[float] = []
    before = {number: signal.signal(number, lambda *_: asked.append(time.monotonic())) for number in STOPS}
    words = command[command.index("--module") + 1 :]
    try:
        launcher = subprocess.Popen(command)
        while launcher.poll() is None:
            if asked and ask_ranks(words):
                asked.clear()
            if asked and time.monotonic() - asked[0] > reach_s:
                launcher.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    launcher.wait(reach_s)
                raise FleetError(
                    "asked to stop, but no rank of this run is on this machine, where it could be asked; the launcher "
                    "was ended, and what its ranks did since their last checkpoint may be lost. Ask on a machine that "
                    "has a rank: `pkill -USR1 -f dbtrain_launchers`"
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(POLL_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode


def ask_ranks(words: Sequence[str]) -> int:
    """How many ranks of a run were asked to stop."""
    reached = 0
    for rank in ranks_here(words):
        with contextlib.suppress(OSError):
            os.kill(rank, signal.SIGUSR1)
            reached += 1
    return reached


def ranks_here(words: Sequence[str]) -> list[int]:
    """This machine's ranks of a run, by the words that they were started with: ranks that came by ssh stand under its
    daemon and not under the launcher."""
    wanted = [word.encode() for word in words]
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().split(b"\0")[:-1] if entry.name.isdigit() else []
            rank = wanted[:1] + [part for part in line if part.startswith(b"--local_rank")] + wanted[1:]
            if len(rank) > len(wanted) and line[-len(rank) :] == rank and b"deepspeed.launcher.launch" not in line:
                found.append(int(entry.name))
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


LAUNCHER = Launcher(render, ("nodes", "gpus"), start)
