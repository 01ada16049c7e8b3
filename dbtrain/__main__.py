"""`python -m dbtrain`: the same as the `dbtrain` command, also from a checkout that is not installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / name) for name in ("kernels", "launchers") if (ROOT / name).is_dir()]

from dbtrain.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
