"""The entry of one rank of `dbtrain train`, started by `deepspeed --module dbtrain_launchers train ...` or by `srun`.

No other module of this package calls the command line.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence

_LOCAL_RANK = re.compile(r"--local[-_]rank(?:=(\d+))?")
_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def split_local_rank(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The local rank that a launcher put before the user's arguments (None: it put none), and the user's arguments.

    DeepSpeed writes `--local_rank=N`. Launchers of torch wrote `--local-rank=N`, or the name and N as two words. Only
    the beginning is read, so no argument of the user is ever removed.
    """
    match = _LOCAL_RANK.fullmatch(arguments[0]) if arguments else None
    if match is None:
        return None, list(arguments)
    if match[1] is not None:
        return match[1], list(arguments[1:])
    if len(arguments) > 1 and arguments[1].isdecimal():
        return arguments[1], list(arguments[2:])
    return None, list(arguments)


def rank_of_task(environ: Mapping[str, str]) -> dict[str, str]:
    """The rank of this SLURM task, in the variables that torch reads; empty if a launcher has set them already."""
    if "RANK" in environ or not all(theirs in environ for theirs in _SLURM.values()):
        return {}
    return {ours: environ[theirs] for ours, theirs in _SLURM.items()}


def main(arguments: Sequence[str] | None = None, before: Sequence[str] = ()) -> None:
    """Run `dbtrain` as one rank, and exit with its code.

    `arguments`: what the launcher passed; None: those of this process. `before`: words to put before the user's.
    """
    rank, rest = split_local_rank(sys.argv[1:] if arguments is None else arguments)
    os.environ.update(rank_of_task(os.environ))
    if rank is not None:
        os.environ.setdefault("LOCAL_RANK", rank)
    if os.environ.get("RANK", "0") != "0":
        # Only rank 0 prints the result: the output of several ranks together would be no JSON.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    from dbtrain.cli import main as dbtrain

    dbtrain([*before, *rest])


if __name__ == "__main__":
    main()
