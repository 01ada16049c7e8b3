"""CONTRIBUTING.md replayed: its examples are added to a copy of the sources, and pass their contract tests."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("dbtrain", "kernels", "launchers", "embedded", "configs", "tests", "pyproject.toml")
PLACE = r"<!-- (new file|at the end of|row of): ([\w/.]+)(?: (\w+))? -->"
EXAMPLE = re.compile(rf"^{PLACE}\n```\w+\n(.*?)^```$", re.M | re.S)
CONTRACTS = {
    "tests/contracts/test_family.py": 8,
    "tests/contracts/test_weighting.py": 13,
    "tests/contracts/test_op.py": 8,
    "tests/contracts/test_metric.py": 5,
    "tests/settings/test_shipped_recipes.py": 2,
}
"""The contract tests of what is added, and how many of them at least are about it."""
SCHEMA = "tests/settings/test_recipes.py"
"""The file of the test that compares the committed schema with the settings."""


def examples():
    """(how, file, table, text) of every example of the page, in order."""
    return EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))


def with_row(source, table, row):
    """Source text with a row at the end of a dict that is assigned to `table`, perhaps inside a call."""
    assignments = [node for node in ast.parse(source).body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    (assigned,) = [
        node.value for node in assignments if table in ast.unparse(node).partition("=")[0].split(":")[0].split()
    ]
    (rows,) = [assigned] if isinstance(assigned, ast.Dict) else assigned.args
    lines = source.splitlines(keepends=True)
    end = sum(len(line.encode()) for line in lines[: rows.end_lineno - 1]) + rows.end_col_offset - 1
    before, after = source.encode()[:end].decode().rstrip(), source.encode()[end:].decode()
    return f"{before}{'' if before.endswith((',', '{')) else ','}\n{row}{after}"


def add(example, folder):
    """Do in a copy of the sources what an example says."""
    how, name, table, text = example
    path = folder / name
    if how == "new file":
        assert not path.exists(), name
        path.write_text(text)
    elif how == "at the end of":
        path.write_text(f"{path.read_text('utf-8')}\n\n{text}")
    else:
        path.write_text(with_row(path.read_text("utf-8"), table, text))


def write_schema(folder):
    """Run in a copy of the sources the command that the page gives for the schema."""
    ((words, name),) = re.findall(r"`dbtrain ([\w ]+) > ([\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    command = [sys.executable, "-c", "from dbtrain import cli; cli.main()", *words.split()]
    roots = os.pathsep.join(str(folder / root) for root in (".", "kernels", "launchers"))
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": roots}, capture_output=True, check=True)
    (folder / name).write_bytes(done.stdout)


@pytest.fixture
def copy(tmp_path):
    """A copy of the sources; the assets of the embedded base are large and stay where they are."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
        else:
            shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "dbtrain/tiny/assets").symlink_to(ROOT / "dbtrain/tiny/assets")
    return tmp_path


def test_a_row_goes_to_the_end_of_its_table():
    assert with_row("A = {1: 2}\nB = f({'ä': 2})\n", "B", "3: 4,\n") == "A = {1: 2}\nB = f({'ä': 2,\n3: 4,\n})\n"
    assert with_row("A: dict = {\n    1: 2,\n}\n", "A", "3: 4,\n") == "A: dict = {\n    1: 2,\n3: 4,\n}\n"


@pytest.mark.slow
def test_the_examples_pass_their_contract_tests(copy):
    """In a process of its own, with Triton's interpreter, so that the kernel itself answers."""
    for example in examples():
        add(example, copy)
    write_schema(copy)
    start = "import sys, triton, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    words = ["-p", "no:cacheprovider", "-v", "-m", "not gpu", "-k", "toy or every_metric_has or committed_schema"]
    own = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    own.pop("PYTEST_CURRENT_TEST", None)
    command = [sys.executable, "-c", start, *words, *CONTRACTS, SCHEMA]
    done = subprocess.run(command, cwd=copy, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(rf"^{SCHEMA}::.*committed_schema.* PASSED", done.stdout, re.M)
    passed = {name: len(re.findall(rf"^{name}::.*toy.* PASSED", done.stdout, re.M)) for name in CONTRACTS}
    assert all(passed[name] >= least for name, least in CONTRACTS.items()), passed


def test_every_table_of_the_page_has_its_example():
    assert [(how, table) for how, _, table, _ in examples() if table] == [
        ("row of", table) for table in ("FAMILIES", "FAMILIES", "FACTS", "WEIGHTINGS", "OPS", "METRICS", "PLAIN")
    ]
