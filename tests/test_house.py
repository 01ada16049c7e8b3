"""House rules that a reader feels: small files, small functions, telling names, nothing left over."""

import ast
import statistics
import subprocess
import sys
from functools import cache
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
    "flask",
    "fsspec",
    "hypothesis",
    "jinja2",
    "huggingface_hub",
    "kernels",
    "lpips",
    "moto",
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
    "s3fs",
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

AT_THE_TOP = {"__init__", "__main__", "api", "cli", "train", "values", "randomness", "errors", "machine"}
"""Modules directly in `dbtrain/`. A new module belongs in one of its folders."""

TOP = set("""
    .ci .dockerignore .gitignore CHANGELOG.md CONTRIBUTING.md Dockerfile LICENSE Makefile NOTICE
    README.md SECURITY.md benchmarks configs constraints.txt dbtrain docs embedded kernels launchers pyproject.toml
    setup.py tests
""".split())
"""All that may lie at the top of the repository. A trial run by hand once left a folder there that was committed."""

CORE = """
    dbtrain/train.py dbtrain/values.py dbtrain/randomness.py dbtrain/objective/*.py dbtrain/training/step.py
    dbtrain/training/job.py dbtrain/training/session.py dbtrain/training/bank.py dbtrain/training/trainables.py
    dbtrain/training/claims.py dbtrain/training/identity.py dbtrain/models/family.py dbtrain/models/adapters.py
    dbtrain/families/sd.py dbtrain/families/sdxl.py dbtrain/engines/engine.py dbtrain/engines/world.py
    dbtrain/engines/packed.py dbtrain/packing/pack.py
"""
WHEEL = "dbtrain/*.py dbtrain/*/*.py kernels/dbtrain_kernels/*.py launchers/dbtrain_launchers/*.py"
BUDGETS = {
    "core": (3_965, CORE),
    "verbs": (2_960, "dbtrain/verbs/*.py"),
    "report": (1_750, "dbtrain/report/*.py"),
    "fleet": (4_300, "dbtrain/fleet/*.py"),
    "evaluate": (1_600, "dbtrain/evaluate/*.py"),
    "subjects and data": (4_110, "dbtrain/subjects/*.py dbtrain/data/*.py"),
    "kernels": (2_870, "kernels/dbtrain_kernels/*.py"),
    "wheel": (35_950, WHEEL),
}
"""Most lines of each room, and its files. Raise a budget only in a commit that says why."""
MAX_FAMILY_LINES = 150

COVERED = {
    "dbtrain/__main__.py": "tests/test_cli.py",
    "dbtrain/bench/cards.py": "tests/bench/test_roofline.py",
    "dbtrain/bench/flops.py": "tests/bench/test_operators.py",
    "dbtrain/bench/gpu_forms.py": "tests/bench/test_roofline.py",
    "dbtrain/families/*.py": "tests/contracts/test_family.py",
    "dbtrain/models/adapter_names.py": "tests/models/test_adapters.py",
    "dbtrain/models/architectures.py": "tests/bench/test_operators.py",
    "dbtrain/models/pipelines.py": "tests/contracts/test_family.py",
    "dbtrain/models/schedules.py": "tests/contracts/test_family.py",
    "dbtrain/models/unet.py": "tests/contracts/test_family.py",
    "dbtrain/verbs/launch.py": "tests/contracts/test_launcher.py",
    "kernels/dbtrain_kernels/*_triton.py": "tests/contracts/test_op.py",
    "kernels/dbtrain_kernels/cases.py": "tests/contracts/test_op.py",
    "kernels/dbtrain_kernels/reference.py": "tests/contracts/test_op.py",
    "launchers/dbtrain_launchers/on_*.py": "tests/contracts/test_launcher.py",
}
"""Modules without a test file of their name, and the tests that cover them: mostly those of a contract."""
PACKAGES = {
    "dbtrain": "tests",
    "kernels/dbtrain_kernels": "tests/kernels",
    "launchers/dbtrain_launchers": "tests/launchers",
    "embedded/dbtrain_embedded": "tests/embedded",
}
"""Folders of sources, and the folders of their tests."""


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


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file, which several rules read."""
    return ast.parse(path.read_text("utf-8"))


@cache
def functions(path: Path) -> list[tuple[str, int, int]]:
    """Name, length and limit of each function; its decorators and docstring are not counted."""
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            lines = node.end_lineno - body[0].lineno + 1 + (node.body[0].lineno - node.lineno)
            found.append((f"{path.name}:{node.name}", lines, MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES))
    return found


def sources() -> list[Path]:
    """Every source file of ours, from the root of the project."""
    return [path.relative_to(ROOT) for folder in PACKAGES for path in tracked(f"{folder}/*.py")]


def lines_of(patterns: str) -> int:
    """Lines in all files of some patterns, which spaces part; each pattern must match."""
    files = {pattern: list(ROOT.glob(pattern)) for pattern in patterns.split()}
    assert [pattern for pattern, matched in files.items() if not matched] == []
    return sum(len(path.read_text("utf-8").splitlines()) for path in set().union(*files.values()))


def namesake(module: Path) -> Path:
    """The test file of a module's name: `dbtrain/data/tar.py` has `tests/data/test_tar.py`."""
    folder = next(folder for folder in PACKAGES if module.is_relative_to(folder))
    return Path(PACKAGES[folder]) / module.parent.relative_to(folder) / f"test_{module.stem.strip('_')}.py"


def private_names(files: list[Path]) -> list[str]:
    """A line for every private name of one file that another file imports, or reads as an attribute."""
    trees = {path: parsed(ROOT / path) for path in files}
    named = (ast.FunctionDef, ast.ClassDef)
    own = {path: {node.name for node in ast.walk(tree) if isinstance(node, named)} for path, tree in trees.items()}
    for path, tree in trees.items():
        nodes = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
        own[path] |= {node.id for node in nodes if isinstance(node, ast.Name)}
        own[path] |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    private = {name for names in own.values() for name in names if name.startswith("_") and not name.startswith("__")}
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            found += [f"{path}:{node.lineno} {name}" for name in names if name in private - own[path]]
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


def test_nothing_new_lies_at_the_top():
    assert {path.stem for path in (ROOT / "dbtrain").glob("*.py")} == AT_THE_TOP


def test_nothing_strange_lies_at_the_top_of_the_repository():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("needs the repository")
    assert {name.split("/")[0] for name in listed.stdout.split("\0") if name} - TOP == set()


@pytest.mark.parametrize("room", BUDGETS)
def test_a_room_keeps_its_budget(room):
    budget, patterns = BUDGETS[room]
    assert lines_of(patterns) <= budget


def test_a_family_keeps_its_budget():
    sizes = {path.name: lines_of(str(path.relative_to(ROOT))) for path in ROOT.glob("dbtrain/families/*.py")}
    assert {name: lines for name, lines in sizes.items() if lines > MAX_FAMILY_LINES} == {}


def test_every_module_has_a_test_of_its_name():
    modules = [path for path in sources() if path.name != "__init__.py"]
    without = [path for path in modules if not (ROOT / namesake(path)).exists()]
    assert [str(path) for path in without if not any(path.match(pattern) for pattern in COVERED)] == []


def test_covered_modules_have_no_test_of_their_name_and_their_tests_exist():
    modules = [path for path in sources() if not (ROOT / namesake(path)).exists()]
    assert [pattern for pattern in COVERED if not any(path.match(pattern) for path in modules)] == []
    assert [name for name in COVERED.values() if not (ROOT / name).exists()] == []


def test_private_names_stay_in_their_file():
    assert private_names(sources()) == []


def test_private_names_that_are_read_elsewhere_are_seen(tmp_path):
    (tmp_path / "one.py").write_text("def _f(): ...\nclass A:\n    def __init__(self):\n        self._x = self._x\n")
    (tmp_path / "two.py").write_text("from one import _f\nimport os\nprint(a._x, os._exit)\n")
    found = private_names([tmp_path / "one.py", tmp_path / "two.py"])
    assert [line.split("two.py:")[1] for line in found] == ["1 _f", "3 _x"]
