"""The contract tests of every operation again, answered by the Triton kernels, in a process of their own.

Triton decides on its interpreter when it is imported, so the switch is set for a new process: no other test sees it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dbtrain_kernels import OPS
from dbtrain_kernels.dispatch import interpreting

ROOT = Path(__file__).resolve().parents[2]
FILES = ["tests/contracts/test_op.py", *(f"tests/kernels/test_{name}.py" for name in (*OPS, "launches"))]
PLAIN = ("gradcheck", "mutants", "plain_form_alone", "far_off", "reference_is_the", "whole_schedule", "in_parts")
"""Words of tests that start no kernel: the ordinary run has them."""
START = "import sys, triton, pytest; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.slow
@pytest.mark.timeout(900)  # about 65 s of processor time, interpreted; a busy machine takes its time
def test_the_kernels_keep_the_contract():
    words = ["-p", "no:cacheprovider", "-q", "-m", "not gpu", "-k", " and ".join(f"not {word}" for word in PLAIN)]
    command = [sys.executable, "-c", START, *words, *FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted and int(counted[1]) > 100 and "skipped" not in done.stdout, done.stdout[-500:]


def test_this_process_has_no_interpreter_unless_it_was_asked_for():
    assert interpreting() == (os.environ.get("TRITON_INTERPRET") == "1" and "triton" in sys.modules)
