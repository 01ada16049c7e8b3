"""The script for `deepspeed launchers/train.py MANIFEST --subject ID ...`; works from a bare checkout and installed."""

import sys
from pathlib import Path

# This file's own folder is on the path already, as any script's is; the checkout's other source roots join it.
sys.path[1:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

from dbtrain_launchers.__main__ import main  # noqa: E402

main(before=["train"])
