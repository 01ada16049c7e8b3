"""House rules that a reader feels: small files, small functions, telling names, nothing left over."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 120
MEDIAN_FUNCTION_LINES = 10
VAGUE = {"utils", "util", "common", "helpers", "helper", "types", "logging", "misc", "base"}
LIBRARIES = {
    "accelerate",
    "deepspeed",
    "diffusers",
    "fsspec",
    "hypothesis",
    "jinja2",
    "kernels",
    "lpips",
    "ninja",
    "numpy",
    "peft",
    "pillow",
    "playwright",
    "PIL",
    "pyarrow",
    "pydantic",
    "pytest",
    "ray",
    "requests",
    "rich",
    "safetensors",
    "tensorboard",
    "torch",
    "torchvision",
    "trackio",
    "transformers",
    "triton",
    "typer",
    "wandb",
    "webdataset",
    "xformers",
    "yaml",
}
# Built in pieces, so that this file passes its own test.
LEFTOVERS = ["TO" + "DO", "FIX" + "ME", "XX" + "X:"]
PLACES = ["/" + "work/", "/" + "home/", "/" + "root/", "/" + "Users/", "/opt/" + "pypi", "/opt/" + "wheels"]
HOSTS = ["pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org", "index-" + "url", "find-" + "links"]


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks, and new ones that it does not ignore; all files where there is no repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z", "--", *(patterns or ["."])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        names = [path for pattern in patterns or ["*"] for path in ROOT.rglob(pattern)]
    return sorted(path for path in names if path.is_file() and not path.is_symlink())


def texts() -> list[tuple[Path, str]]:
    """Every tracked text file with its content; assets are data, not text of ours."""
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data[:4096] and "assets" not in path.parts and "results" not in path.parts:
            found.append((path.relative_to(ROOT), data.decode("utf-8")))
    return found


def functions(path: Path) -> list[tuple[str, int, int]]:
    """Name, length and limit of each function; its decorators and docstring are not counted."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            lines = node.end_lineno - body[0].lineno + 1 + (node.body[0].lineno - node.lineno)
            found.append((f"{path.name}:{node.name}", lines, MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES))
    return found


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked("*.py")
        if (lines := len(path.read_text("utf-8").splitlines())) >= MAX_FILE_LINES
    }
    assert long == {}


def test_functions_are_short():
    found = [entry for path in tracked("*.py") for entry in functions(path)]
    assert [entry for entry in found if entry[1] >= entry[2]] == []


def test_the_median_function_is_shorter_than_ten_lines():
    sources = tracked("dbtrain/*.py", "kernels/*.py", "launchers/*.py", "embedded/*.py")
    lengths = [lines for path in sources for _, lines, _ in functions(path)]
    assert statistics.median(lengths) < MEDIAN_FUNCTION_LINES


def test_module_names_say_something_and_hide_nothing():
    modules = {
        path.stem if path.stem != "__init__" else path.parent.name: path.relative_to(ROOT)
        for path in tracked("dbtrain/*.py", "kernels/*.py", "launchers/*.py", "embedded/*.py", "benchmarks/*.py")
        if path.stem != "__main__"
    }
    taken = VAGUE | LIBRARIES | set(sys.stdlib_module_names)
    assert {name: str(path) for name, path in modules.items() if name in taken} == {}


@pytest.mark.parametrize("root", ["kernels", "launchers", "embedded", "configs", "tests"])
def test_source_roots_are_no_packages(root):
    assert not (ROOT / root / "__init__.py").exists()


def test_every_package_folder_has_an_init():
    folders = {path.parent for path in tracked("dbtrain/*.py", "kernels/*/*.py", "launchers/*/*.py", "embedded/*/*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_nothing_is_left_over():
    found = [f"{path}: {word}" for path, text in texts() for word in LEFTOVERS if word in text]
    assert found == []


def test_no_place_of_one_machine_is_written_down():
    found = [f"{path}: {place}" for path, text in texts() for place in PLACES if place in text]
    assert found == []


def test_no_package_registry_is_written_down():
    found = [f"{path}: {host}" for path, text in texts() for host in HOSTS if host in text]
    assert found == []


def test_a_long_function_is_seen(tmp_path):
    path = tmp_path / "long.py"
    path.write_text('def f():\n    """Not counted.\n\n    Nor this.\n    """\n' + "    x = 1\n" * 90)
    assert functions(path) == [("long.py:f", 91, MAX_FUNCTION_LINES)]
