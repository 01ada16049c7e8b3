"""The import drawing of the project, made true: imports point down, and each heavy library has one door."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "dbtrain": ROOT,
    "dbtrain_kernels": ROOT / "kernels",
    "dbtrain_launchers": ROOT / "launchers",
    "dbtrain_embedded": ROOT / "embedded",
}

# From the top: a folder imports from the rows below its own, and from no other folder of its row.
ORDER = (
    ("dbtrain_launchers.__main__", "dbtrain.__main__"),  # a rank's entry and the program's call the command line
    ("dbtrain.cli", "dbtrain.api"),  # the doors: for people, and for programs
    ("dbtrain.verbs",),
    ("dbtrain.report",),
    ("dbtrain.fleet", "dbtrain.bench", "dbtrain.study", "dbtrain_launchers"),
    ("dbtrain.train",),
    ("dbtrain.packing",),
    ("dbtrain.training", "dbtrain.evaluate"),
    ("dbtrain.priors", "dbtrain.results"),
    ("dbtrain.families",),
    ("dbtrain.models", "dbtrain.subjects"),
    ("dbtrain.objective", "dbtrain.engines", "dbtrain.data"),
    ("dbtrain.settings", "dbtrain.storage"),
    ("dbtrain.values", "dbtrain.randomness", "dbtrain.machine", "dbtrain_embedded"),
    ("dbtrain", "dbtrain.errors", "dbtrain.tiny", "dbtrain_kernels"),
)
ON_THE_GROUND = ("dbtrain", "dbtrain.families", "dbtrain.objective")
"""Package files that only hold names, as text: they import nothing of ours, and settings read them."""

DOORS = {
    "diffusers": ["dbtrain.families", "dbtrain.models", "dbtrain_embedded"],
    "transformers": ["dbtrain.families", "dbtrain.models", "dbtrain_embedded", "dbtrain.evaluate"],
    "deepspeed": ["dbtrain.engines.zero"],
    "webdataset": ["dbtrain.data"],
    "triton": ["dbtrain_kernels"],
    "ray": ["dbtrain.fleet", "dbtrain_launchers"],
}


def module_name(path: Path, root: Path) -> str:
    """The dotted name of a source file; a package's `__init__.py` has the package's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> dict[str, Path]:
    """Every module of the three packages with its file."""
    return {
        module_name(path, root): path for package, root in SOURCES.items() for path in (root / package).rglob("*.py")
    }


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Dotted names that a module imports anywhere in it, lazily too, with their lines; `from a import b` gives `a.b`.

    Imports under `if TYPE_CHECKING` count as well: an arrow that only a type needs is still an arrow.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{start}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), node.lineno


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def place(name: str, modules: set[str]) -> tuple[int, str] | None:
    """Row in `ORDER` and folder of an imported name; None for code that is not ours."""
    if name.split(".")[0] not in SOURCES:
        return None
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    if name in ON_THE_GROUND:
        return len(ORDER) - 1, name
    listed = [
        (len(folder), row, folder)
        for row, folders in enumerate(ORDER)
        for folder in folders
        if is_within(name, folder) and folder != "dbtrain"
    ]
    return max(listed)[1:] if listed else None


def imports_of(files: dict[str, Path]) -> Iterator[tuple[str, int, str]]:
    """(module, line, imported name) of every import of a name of ours."""
    for module, path in files.items():
        tree = ast.parse(path.read_text("utf-8"))
        for name, line in imported_names(tree, module, path.name == "__init__.py"):
            if name.split(".")[0] in SOURCES:
                yield module, line, name


def wrong_imports(files: dict[str, Path]) -> list[str]:
    """A line for every import that points up, or to another folder of the same row."""
    modules = set(files)
    wrong = []
    for module, line, name in imports_of(files):
        own, other = place(module, modules), place(name, modules)
        if own is not None and other is not None and own[1] != other[1] and other[0] <= own[0]:
            wrong.append(f"{module}:{line} (row {own[0]}) imports {name} (row {other[0]})")
    return wrong


def foreign_imports(files: dict[str, Path]) -> list[str]:
    """A line for every import in `dbtrain_embedded` from our other packages that is not of `dbtrain.tiny`."""
    return [
        f"{module}:{line} imports {name}"
        for module, line, name in imports_of(files)
        if is_within(module, "dbtrain_embedded")
        and not is_within(name, "dbtrain_embedded")
        and not is_within(name, "dbtrain.tiny")
    ]


def circle(files: dict[str, Path]) -> list[str]:
    """Modules of which each imports the next and the last one the first; empty where there are none."""
    arrows: dict[str, set[str]] = {module: set() for module in files}
    for module, _, name in imports_of(files):
        while name not in files and "." in name:
            name = name.rpartition(".")[0]
        if name in files and name != module:
            arrows[module].add(name)
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def wrong_doors(files: dict[str, Path]) -> list[str]:
    """A line for every import of a library by a module that is not its door."""
    found = []
    for module, path in files.items():
        for name, line in imported_names(ast.parse(path.read_text("utf-8")), module, path.name == "__init__.py"):
            doors = DOORS.get(name.split(".")[0])
            if doors is not None and not any(is_within(module, door) for door in doors):
                found.append(f"{module}:{line} imports {name}; only {', '.join(doors)} may")
    return found


def test_every_module_has_a_place():
    files = source_files()
    assert [name for name in files if place(name, set(files)) is None] == []


def test_imports_point_down():
    assert wrong_imports(source_files()) == []


def test_the_making_of_the_embedded_base_imports_only_its_paths():
    assert foreign_imports(source_files()) == []


@pytest.mark.parametrize("text", ["from dbtrain import values", "import dbtrain.errors", "import dbtrain_kernels"])
def test_foreign_imports_are_seen(tmp_path, text):
    path = tmp_path / "one.py"
    path.write_text(f"from dbtrain.tiny import BASE\n{text}\n")
    assert len(foreign_imports({"dbtrain_embedded.world": path, "dbtrain.train": path})) == 1


def test_no_modules_import_each_other():
    assert circle(source_files()) == []


def test_one_door_per_library():
    assert wrong_doors(source_files()) == []


@pytest.mark.parametrize(
    "text, module, expected",
    [
        ("from dbtrain import train", "dbtrain.training.step", "imports dbtrain.train"),
        ("from .. import train", "dbtrain.training.step", "imports dbtrain.train"),
        ("def f():\n    from dbtrain.cli import main", "dbtrain.fleet.driver", "imports dbtrain.cli.main"),
        ("import dbtrain_launchers.__main__", "dbtrain.cli", "imports dbtrain_launchers.__main__"),
        ("from dbtrain.engines.world import World", "dbtrain.data.index", "imports dbtrain.engines.world.World"),
    ],
)
def test_wrong_imports_are_seen(tmp_path, text, module, expected):
    path = tmp_path / "one.py"
    path.write_text(text)
    assert [expected in line for line in wrong_imports({**empty_files(tmp_path), module: path})] == [True]


def test_circles_are_seen(tmp_path):
    files = empty_files(tmp_path)
    for module, other in (("one", "two"), ("two", "one"), ("three", "one")):
        files[f"dbtrain.data.{module}"] = tmp_path / f"{module}.py"
        files[f"dbtrain.data.{module}"].write_text(f"def f():\n    from dbtrain.data.{other} import x")
    assert set(circle(files)) == {"dbtrain.data.one", "dbtrain.data.two"}


def empty_files(folder: Path) -> dict[str, Path]:
    """Every module of the project, as if it imported nothing."""
    (folder / "none.py").write_text("")
    return dict.fromkeys(source_files(), folder / "none.py")


@pytest.mark.parametrize(
    "text, module",
    [
        ("def f():\n    import deepspeed.comm", "dbtrain.engines.engine"),
        ("from diffusers import UNet2DConditionModel", "dbtrain.evaluate.scores"),
        ("import importlib\nimportlib.import_module('ray')", "dbtrain.train"),
    ],
)
def test_wrong_doors_are_seen(tmp_path, text, module):
    path = tmp_path / "one.py"
    path.write_text(text)
    assert len(wrong_doors({module: path})) == 1


def test_downward_imports_and_asset_paths_are_fine(tmp_path):
    path = tmp_path / "one.py"
    path.write_text(
        "import os\nfrom dbtrain.tiny import BASE\nfrom dbtrain import __version__\nfrom dbtrain.errors import x\n"
    )
    assert wrong_imports({**source_files(), "dbtrain.families.sd": path}) == []


@pytest.mark.parametrize(
    "module",
    [
        "dbtrain",
        "dbtrain.cli",
        "dbtrain.settings.config",
        "dbtrain.settings.recipes",
        "dbtrain_launchers",
        "dbtrain_launchers.__main__",
    ],
)
def test_light_modules_load_no_heavy_library(module):
    if module not in source_files():
        pytest.skip(f"{module} is not written yet")
    code = (
        f"import sys, {module}; heavy = {sorted([*DOORS, 'torch'])!r}; "
        "print(sorted(set(heavy) & {name.split('.')[0] for name in sys.modules}))"
    )
    paths = ":".join(map(str, {*SOURCES.values()}))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
