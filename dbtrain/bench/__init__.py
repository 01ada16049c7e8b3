"""What `dbtrain bench` runs: timed comparisons that alternate what they compare."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Say = Callable[[dict[str, Any]], None]
"""What is called with each result as it is measured, so that a bench that is stopped leaves what it found."""


def to_stderr(row: dict[str, Any]) -> None:
    """Print a result as one line of JSON, beside what the bench prints at its end."""
    print(json.dumps(row), file=sys.stderr, flush=True)


def to_nobody(row: dict[str, Any]) -> None:
    """Print nothing."""


def origin() -> dict[str, str | None]:
    """What made a result: versions, the commit if there is one, the command."""
    import torch

    from dbtrain import __version__

    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"torch": torch.__version__, "dbtrain": __version__, "commit": commit(), "command": command}


def commit() -> str | None:
    """The short name of this checkout's commit; None where this is no checkout or git is not there."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip() or None
