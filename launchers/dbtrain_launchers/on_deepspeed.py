"""`dbtrain train` under DeepSpeed's launcher: `deepspeed --num_gpus 2 launchers/train.py MANIFEST --subject ID ...`."""

import os
import re
import sys
from collections.abc import Sequence

_LOCAL_RANK = re.compile(r"--local[-_]rank(?:=(\d+))?")


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `dbtrain train` as one rank; `arguments` defaults to the command line and exits with dbtrain's codes."""
    rank, rest = split_local_rank(sys.argv[1:] if arguments is None else arguments)
    if rank is not None:
        os.environ.setdefault("LOCAL_RANK", rank)
    if os.environ.get("RANK", "0") != "0":
        # The result is printed once: JSON from several ranks would be no JSON.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    from dbtrain.cli import main as dbtrain  # the command line is above the launchers' own parsing

    dbtrain(["train", *rest])


if __name__ == "__main__":
    main()
