"""What `dbtrain bench` runs: timed comparisons that alternate what they compare."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
