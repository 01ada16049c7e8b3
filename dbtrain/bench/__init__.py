"""What `dbtrain bench` runs: timed comparisons that alternate what they compare."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def origin() -> dict[str, str | None]:
    """What made a result: versions, the commit if this is a checkout (else None), the command."""
    import torch

    from dbtrain import __version__

    commit = None
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip() or None
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"torch": torch.__version__, "dbtrain": __version__, "commit": commit, "command": command}
