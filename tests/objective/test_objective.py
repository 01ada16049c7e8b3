"""The table of what can be chosen: light, whole, and true."""

import subprocess
import sys

import pytest

from dbtrain import objective
from dbtrain.objective.weighting import X0_ERROR
from dbtrain_kernels.reference import TARGETS

ROWS = [*objective.WEIGHTINGS.items(), *((name, row) for name, row in objective.DISTRIBUTIONS.items() if row)]


@pytest.mark.parametrize("name, row", ROWS)
def test_a_name_is_that_of_its_function(name, row):
    assert objective.load(row).__name__ == name


def test_the_tables_name_the_same_parameterizations():
    assert set(objective.PARAMETERIZATIONS) == TARGETS.keys() == X0_ERROR.keys()


def test_reading_the_names_loads_no_pytorch():
    code = "import sys, dbtrain.objective; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
