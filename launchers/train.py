"""The script for `deepspeed launchers/train.py MANIFEST --subject ID ...`; dbtrain need not be installed."""

import sys
from pathlib import Path

# Python has put this file's folder on the path. These are the two other source roots of the checkout.
sys.path[1:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

from dbtrain_launchers.__main__ import main  # noqa: E402

main(before=["train"])
