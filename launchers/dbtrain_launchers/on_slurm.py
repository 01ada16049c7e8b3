"""A run as a SLURM batch script: ranks over nodes, an array of runs, or a Ray cluster inside the allocation.

A run that exits with 75 has written a checkpoint. The script requeues the job, and the same command continues the run.
SLURM sends USR1 before the time limit and TERM on preemption. The script passes both to the run's step as USR1.
"""

import re
import shlex
from typing import Annotated

import typer

from dbtrain_launchers.plan import (
    Launcher,
    LaunchPlan,
    Rendered,
    assigned_gpu_findings,
    check_program,
    form_findings,
    plain_findings,
    refuse,
    start_program,
)

_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_TIME = re.compile(r"\d+(-\d+)?(:\d+){0,2}")
_TASK = "{task}"


def render(
    plan: LaunchPlan,
    *,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, such as 12:00:00.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each node, such as 64G.")] = None,
    log: Annotated[str, typer.Option(help="Log file; %x is the name, %j the job.")] = "%x-%j.log",
    grace_s: Annotated[int, typer.Option(min=10, help="Seconds before the limit to stop, with a checkpoint.")] = 120,
    array: Annotated[
        str | None, typer.Option(help="Tasks such as 0-9; `{task}` in WORDS is the task's number.")
    ] = None,
    python: Annotated[str, typer.Option(help="Python on the nodes.")] = "python",
) -> Rendered:
    """Run under SLURM: `train` as one rank a GPU on all nodes, `batch run` on a Ray cluster inside the allocation.

    \b
    Example:
      dbtrain launch slurm --nodes 4 --gpus 8 --time 12:00:00 \\
        -- batch run all.csv --config sdxl_lora --out /nfs/all --ledger /local
      dbtrain launch slurm --gpus 1 --array 0-99%20 -- train {task}.csv --subjects all --config tiny --out runs/{task}
    """
    findings = plain_findings(partition=partition, account=account, qos=qos, memory=memory, log=log, python=python)
    findings += assigned_gpu_findings(plan, "SLURM") if plan.gpus else []
    findings += form_findings(_TIME, "minutes or [days-]hours:minutes:seconds", time=time)
    refuse(findings + form_findings(_ARRAY, "numbers and ranges such as 0-9%4", array=array))
    tasks = 1 if plan.is_batch else plan.ranks
    settings = {
        "job-name": plan.name,
        "nodes": plan.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": plan.gpus or None,
        "cpus-per-task": max(plan.cpus // tasks, 1) if plan.cpus else None,
        "mem": memory,
        "time": time,
        "partition": partition,
        "account": account,
        "qos": qos,
        "array": array,
        "output": log,
        "open-mode": "append",
        "signal": f"B:USR1@{grace_s}",
    }
    directives = [f"#SBATCH --{name}={value}" for name, value in settings.items() if value is not None]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in plan.env.items()]
    begin = ["#!/bin/bash", *directives, "#SBATCH --requeue", "set -u", *exports, f"python={python}"]
    parts = (_TRAP, _body(plan, array is not None), _WAIT)
    return Rendered(("sbatch",), "\n".join([*begin, *(part.strip() for part in parts), ""]))


def quoted(word: str, in_array: bool = False) -> str:
    """A word in quotes for bash. In an array job, `{task}` is replaced by the task's number."""
    if not in_array or _TASK not in word:
        return shlex.quote(word)
    return '"$SLURM_ARRAY_TASK_ID"'.join(shlex.quote(part) if part else "" for part in word.split(_TASK))


def _body(plan: LaunchPlan, in_array: bool) -> str:
    """The part of the script that starts the run's step. The user's words go in last: nothing is replaced in them."""
    given = {"--num-cpus": plan.cpus, "--num-gpus": plan.gpus}
    options = " ".join(["--disable-usage-stats", *(f"{name}={value}" for name, value in given.items() if value)])
    words = " ".join(quoted(word, in_array) for word in plan.cluster_words)
    return (_CLUSTER if plan.is_batch else _RANKS).replace("@OPTIONS@", options).replace("@WORDS@", words)


# The trap is set before the step starts, so that no signal is lost. After a signal that came before the step, the step
# is not started.
_TRAP = """
step= asked=
leave() { [ "$1" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"; exit "$1"; }
trap 'asked=yes; [ -n "$step" ] && kill -s USR1 "$step"' USR1 TERM
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\\n'*}
port=$((20000 + SLURM_JOB_ID % 20000))
"""

# Ranks that stop on request end at slightly different times. So the first exit code of 75 must not kill the others
# (--kill-on-bad-exit=0). After a crash, the other ranks are killed after 60 seconds (--wait).
_RANKS = """
address=$(scontrol show node "$head" | grep -o 'NodeAddr=[^ ]*')
export MASTER_ADDR="${address#NodeAddr=}" MASTER_PORT="$port"
[ -z "$asked" ] || leave 75
srun --kill-on-bad-exit=0 --wait=60 "$python" -m dbtrain_launchers @WORDS@ &
"""

# The token keeps other users of the nodes out of the cluster. Without a dashboard there is no job API to protect.
_CLUSTER = """
token="$SLURM_SUBMIT_DIR/.ray-token-$SLURM_JOB_ID"
trap 'rm -f "$token"' EXIT
(umask 077; "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' > "$token") || exit 1
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"
on_head=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head")
addresses=$("${on_head[@]}" hostname -I)
export RAY_ADDRESS="${addresses%% *}:$port"
ray=("$python" -m ray.scripts.scripts)
"${on_head[@]}" "${ray[@]}" start --head --node-ip-address="${RAY_ADDRESS%:*}" --port="$port" \\
  --include-dashboard=false @OPTIONS@ --block &
until "${on_head[@]}" "${ray[@]}" health-check --address "$RAY_ADDRESS" 2>/dev/null; do
  kill -0 $! || exit 5
  sleep 1
done
if [ "$SLURM_NNODES" -gt 1 ]; then
  srun --overlap --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \\
    "${ray[@]}" start --address="$RAY_ADDRESS" @OPTIONS@ --block &
fi
[ -z "$asked" ] || leave 75
"${on_head[@]}" "$python" -m dbtrain @WORDS@ &
"""

# A trapped signal ends `wait` while the step still runs; another `wait` then returns the step's exit code. A signal
# between the step's start and `step=$!` is passed on here.
_WAIT = """
step=$!
[ -z "$asked" ] || { asked=; kill -s USR1 "$step"; }
wait "$step"; code=$?
while [ -n "$asked" ]; do asked=; wait "$step"; code=$?; done
leave "$code"
"""


def start(rendered: Rendered) -> int:
    """The exit code of sbatch, which prints the job's number. The run starts later."""
    check_program("sbatch", "submit from a login node of the cluster")
    return start_program(rendered)


LAUNCHER = Launcher(render, ("nodes", "gpus", "cpus", "name"), start)
