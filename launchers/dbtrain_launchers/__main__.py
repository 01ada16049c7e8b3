"""One rank of `dbtrain train`, as `deepspeed --module dbtrain_launchers train ...` or `srun` starts it.

The only module here above the command line, which it calls.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence

_LOCAL_RANK = re.compile(r"--local[-_]rank(?:=(\d+))?")
_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def split_local_rank(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The rank that the launcher put before the user's arguments (None without one), and the user's arguments.

    DeepSpeed writes `--local_rank=N`; `--local-rank=N` and two separate words are what torch's launchers wrote.
    Only the first argument is looked at, so nothing of the user's is ever dropped.
    """
    found = _LOCAL_RANK.fullmatch(arguments[0]) if arguments else None
    if found is None:
        return None, list(arguments)
    if found[1] is not None:
        return found[1], list(arguments[1:])
    if len(arguments) > 1 and arguments[1].isdecimal():
        return arguments[1], list(arguments[2:])
    return None, list(arguments)


def rank_of_task(environ: Mapping[str, str]) -> dict[str, str]:
    """What SLURM's step says of this task, in the names that torch reads; empty where a launcher has said it."""
    if "RANK" in environ or not all(theirs in environ for theirs in _SLURM.values()):
        return {}
    return {ours: environ[theirs] for ours, theirs in _SLURM.items()}


def main(arguments: Sequence[str] | None = None, before: Sequence[str] = ()) -> None:
    """Runs `dbtrain` as one rank and exits with its code; `arguments` None is the command line."""
    rank, rest = split_local_rank(sys.argv[1:] if arguments is None else arguments)
    os.environ.update(rank_of_task(os.environ))
    if rank is not None:
        os.environ.setdefault("LOCAL_RANK", rank)
    if os.environ.get("RANK", "0") != "0":
        # The result is printed once: JSON from several ranks would be no JSON.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    from dbtrain.cli import main as dbtrain

    dbtrain([*before, *rest])


if __name__ == "__main__":
    main()
