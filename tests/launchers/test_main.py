"""The entry of a rank (`dbtrain_launchers.__main__`, `launchers/train.py`): the words it removes and passes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dbtrain_launchers.__main__ import rank_of_task, split_local_rank

SCRIPT = Path(__file__).resolve().parents[2] / "launchers" / "train.py"


@pytest.mark.parametrize(
    ("given", "rank", "rest"),
    [
        (["--local_rank=1", "m.csv"], "1", ["m.csv"]),
        (["--local-rank=0", "m.csv"], "0", ["m.csv"]),
        (["--local_rank", "3", "m.csv"], "3", ["m.csv"]),
        (["--local_rank", "m.csv"], None, ["--local_rank", "m.csv"]),
        (["m.csv", "--local_rank=1"], None, ["m.csv", "--local_rank=1"]),
        (["--local_ranking=1"], None, ["--local_ranking=1"]),
        ([], None, []),
    ],
)
def test_only_the_launchers_own_argument_is_dropped(given, rank, rest):
    assert split_local_rank(given) == (rank, rest)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"},
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"},
        ),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "RANK": "5"}, {}),
        ({"SLURM_PROCID": "0"}, {}),
        ({}, {}),
    ],
)
def test_a_slurm_task_is_a_rank_unless_a_launcher_said_otherwise(environ, expected):
    assert rank_of_task(environ) == expected


def test_the_script_works_from_a_bare_checkout(tmp_path):
    """A stand-in for the command line shows what reaches it, with the real script and its real search path."""
    for name in ("launchers", "kernels", "dbtrain"):
        (tmp_path / name).mkdir()
    (tmp_path / "launchers" / "train.py").write_text(SCRIPT.read_text())
    (tmp_path / "launchers" / "dbtrain_launchers").symlink_to(SCRIPT.parent / "dbtrain_launchers")
    (tmp_path / "dbtrain" / "__init__.py").touch()
    (tmp_path / "dbtrain" / "errors.py").symlink_to(SCRIPT.parents[1] / "dbtrain" / "errors.py")
    (tmp_path / "dbtrain" / "cli.py").write_text(
        "import os\ndef main(args):\n    print(args, os.environ['LOCAL_RANK'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "PYTHONPATH")}
    command = [sys.executable, str(tmp_path / "launchers" / "train.py"), "--local_rank=1", "m.csv", "a.b=c"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == ("['train', 'm.csv', 'a.b=c'] 1", "")
