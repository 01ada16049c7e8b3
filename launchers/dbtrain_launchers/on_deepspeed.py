"""`dbtrain train` under DeepSpeed's launcher: on this machine, on all hosts of a hostfile by ssh, or on one of them."""

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
"""Signals that ask a run to stop."""
POLL_S = 0.2
"""Seconds between two checks for such a signal."""
REACH_S = 30.0
"""Seconds after a signal in which a rank must be found on this machine: ranks need time to start."""
_THROUGH_A_SHELL = re.compile(r"[A-Za-z0-9_@+=:./-][A-Za-z0-9_@+=:./ -]*")
_NUMBER = re.compile(r"[0-9]+")
_HOST_LINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\s+slots=\d+\s*(#.*)?|\s*(#.*)?")


def render(
    plan: LaunchPlan,
    *,
    hostfile: Annotated[Path | None, typer.Option(help="File of lines `HOST slots=N`; none: this machine.")] = None,
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
        findings.append("-- batch run: starts its own processes; use `launch ray`, `slurm` or `kubernetes` for it")
    if no_ssh and (hostfile is None or node_rank is None or master_addr is None):
        findings.append("--no-ssh: needs --hostfile and --master-addr, equal on all nodes, and --node-rank, the node's")
    if plan.nodes > 1 and hostfile is None:
        findings.append(f"--nodes {plan.nodes}: needs --hostfile with the nodes' names")
    if hostfile is not None and not no_ssh:
        findings += remote_findings(plan)
    visible = plan.env.get(VISIBLE, plan.visible)
    if visible is not None:
        findings += visible_findings(visible, plan.gpus, over_hosts=hostfile is not None)
    refuse(findings)
    include = named_gpus(visible, plan.gpus) if visible is not None and hostfile is None else None
    options = {
        "hostfile": hostfile,
        "num_nodes": plan.nodes if plan.nodes > 1 else None,
        "num_gpus": plan.gpus if plan.gpus and include is None else None,
        "include": include,
        "master_addr": master_addr,
        "master_port": master_port,
        "ssh_port": ssh_port,
        "node_rank": node_rank,
    }
    given = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    command = ["deepspeed", *given, *(["--no_ssh"] if no_ssh else []), "--module", "dbtrain_launchers", *plan.words]
    # With this variable set to `1,3`, DeepSpeed may count two GPUs and then refuse number 3.
    unset = ["-u", VISIBLE] if include is not None else []
    variables = [*unset, *(f"{name}={value}" for name, value in plan.env.items() if name != VISIBLE)]
    return Rendered(tuple(["env", *variables, *command] if variables else command))


def named_gpus(visible: str, gpus: int) -> str:
    """The first `gpus` GPUs (0: all) of a value of CUDA_VISIBLE_DEVICES, as DeepSpeed's `--include` takes them."""
    names = [name.strip() for name in visible.split(",")]
    return "localhost:" + ",".join(names[: gpus or None])


def visible_findings(visible: str, gpus: int, over_hosts: bool) -> list[str]:
    """Why DeepSpeed cannot use the first `gpus` GPUs (0: all) of a value of CUDA_VISIBLE_DEVICES, and no others.

    DeepSpeed 0.19 replaces this variable for its ranks (`launcher/launch.py`). On one machine, `--include` chooses the
    ranks' GPUs by number. On each host of a hostfile, the ranks get GPU 0, 1, ... up to the number of slots.
    """
    given, names = f"{VISIBLE}={visible}", [name.strip() for name in visible.split(",")]
    if names[0] in ("", "-1", "NoDevFiles"):
        remedy = "unset it, or run `dbtrain train` without a launcher"
        return [f"{given}: hides all GPUs, but DeepSpeed would give its ranks GPU 0 and the next ones; {remedy}"]
    if not all(_NUMBER.fullmatch(name) for name in names):
        return [f"{given}: DeepSpeed takes GPUs by number only; name them by number, such as {VISIBLE}=1,3"]
    numbers = [int(name) for name in names]
    if len(set(numbers)) < len(numbers):
        return [f"{given}: names a GPU twice; name each one once"]
    if gpus > len(numbers):
        return [f"--gpus {gpus}: {given} names only {len(numbers)}; name more, or ask for fewer"]
    if over_hosts and (gpus == 0 or numbers[:gpus] != list(range(gpus))):
        remedy = "unset it, and give their number by --gpus or by the slots of the hostfile"
        return [f"{given}: DeepSpeed uses GPU 0 and the next ones of every host; {remedy}"]
    return []


def remote_findings(plan: LaunchPlan) -> list[str]:
    """The words and variables that DeepSpeed cannot pass to other hosts safely.

    DeepSpeed 0.19 puts double quotes around words with spaces and no quotes around others
    (`launcher/multinode_runner.py`). The remote shell would therefore run a `$(...)` in a prompt, on every host.
    """
    instead = "move it into the recipe, or start each node with --no-ssh"
    findings = [
        f"{word!r}: cannot go through pdsh's remote shell; {instead}"
        for word in plan.words
        if not _THROUGH_A_SHELL.fullmatch(word) or (word.startswith("-") and " " in word)
    ]
    if plan.env:
        findings.append(
            "--env: ssh does not pass variables on; put them into the file `.deepspeed_env`, or use --no-ssh"
        )
    return findings


def start(rendered: Rendered) -> int:
    """The exit code of DeepSpeed, which is that of a rank: 75 if the run was asked to stop by TERM or USR1."""
    command = rendered.command
    check_program("deepspeed", "activate the environment that holds dbtrain")
    if "--hostfile" in command[: command.index("--module")]:
        refuse(hostfile_findings(Path(command[command.index("--hostfile") + 1])))
        if "--no_ssh" not in command:
            check_program("pdsh", "install pdsh, or start each node with --no-ssh")
            refuse(folder_findings(str(Path.cwd())))
    return start_ranks(command)


def start_ranks(command: Sequence[str], reach_s: float = REACH_S) -> int:
    """The exit code of DeepSpeed's launcher. While it runs, TERM and USR1 are passed to this machine's ranks.

    The launcher must not get these signals: USR1 kills it, and after TERM its exit code is 1 whatever the ranks return.
    Ranks on other machines stop together with those here, because all ranks agree on a stop at each step. Raises
    FleetError if no rank is found on this machine within `reach_s` seconds of a signal; the launcher is ended then.
    """
    asked: list[float] = []  # When a signal came that no rank has got yet.
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
                    "asked to stop, but no rank of this run is on this machine, so none could be asked; the launcher "
                    "was ended, and the work of its ranks since their last checkpoint may be lost. Ask on a machine "
                    "that has a rank: `pkill -USR1 -f dbtrain_launchers`"
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(POLL_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode


def ask_ranks(words: Sequence[str]) -> int:
    """Ask this machine's ranks of a run to stop, by USR1; their number."""
    reached = 0
    for rank in ranks_here(words):
        with contextlib.suppress(OSError):
            os.kill(rank, signal.SIGUSR1)
            reached += 1
    return reached


def ranks_here(words: Sequence[str]) -> list[int]:
    """Process numbers of this machine's ranks of a run.

    They are found by the words of their command line: ranks that were started by ssh are no children of the launcher.
    """
    module, *rest = [word.encode() for word in words]
    ranks = []
    for entry in Path("/proc").iterdir():
        # A process may end while it is read.
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().split(b"\0")[:-1] if entry.name.isdigit() else []
            local_rank = [part for part in line if part.startswith(b"--local_rank")]
            end_of_line = [module, *local_rank, *rest]
            # DeepSpeed's own process on a machine holds the same words, but is no rank.
            if local_rank and line[-len(end_of_line) :] == end_of_line and b"deepspeed.launcher.launch" not in line:
                ranks.append(int(entry.name))
    return ranks


def folder_findings(folder: str) -> list[str]:
    """A finding if a remote shell would misread the working folder: DeepSpeed writes `cd FOLDER;` without quotes."""
    if _THROUGH_A_SHELL.fullmatch(folder) and " " not in folder:
        return []
    return [f"{folder!r}: DeepSpeed gives this folder's name to remote shells; use one without spaces and signs"]


def hostfile_findings(path: Path) -> list[str]:
    """A finding for each line of a hostfile that is not `HOST slots=N`. Raises ConfigError if it cannot be read.

    DeepSpeed itself ignores a missing file, and passes the names to ssh as they are.
    """
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
