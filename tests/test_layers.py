"""The import drawing of the project, made true: imports point down, and each heavy library has one door."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "dbtrain": ROOT,
    "dbtrain_kernels": ROOT / "kernels",
    "dbtrain_launchers": ROOT / "launchers",
    "dbtrain_embedded": ROOT / "embedded",
}

# A module belongs to the longest name here that it starts with. It may import from its own layer and those below.
LAYERS = {
    0: [
        "dbtrain.errors",
        "dbtrain.heads",
        "dbtrain.machine",
        "dbtrain.atomic",
        "dbtrain.config",
        "dbtrain.batch",
        "dbtrain.randomness",
        "dbtrain.sealed",
        "dbtrain.tiny",
        "dbtrain.yaml12",
        "dbtrain_kernels",
    ],
    1: [
        "dbtrain.configfile",
        "dbtrain.prompts",
        "dbtrain.identifiers",
        "dbtrain.migrate",
        "dbtrain.objective",
        "dbtrain.data",
        "dbtrain.families",
        "dbtrain.adapters",
        "dbtrain.engines",
        "dbtrain.checkpoint",
        "dbtrain.proved",
        "dbtrain.ranks",
        "dbtrain.record",
        "dbtrain.registry",
        "dbtrain.snippets",
        "dbtrain.telemetry",
    ],
    2: [
        "dbtrain.priors",
        "dbtrain.priorstore",
        "dbtrain.bank",
        "dbtrain.claims",
        "dbtrain.filling",
        "dbtrain.generate",
        "dbtrain.step",
        "dbtrain.publish",
        "dbtrain.trainables",
        "dbtrain.session",
    ],
    3: ["dbtrain.train", "dbtrain.packing", "dbtrain.evaluate", "dbtrain.doctor"],
    4: ["dbtrain.fleet", "dbtrain.report", "dbtrain.bench", "dbtrain.demo", "dbtrain_launchers"],
    5: ["dbtrain.cli", "dbtrain.verbs", "dbtrain.terminal", "dbtrain.__main__"],
    # A launcher renders texts that the verb `launch` prints or starts; only a rank's entry stands above the verbs.
    6: ["dbtrain_launchers.__main__"],
    # The wheel does not hold it, so no other module may import it.
    7: ["dbtrain_embedded"],
}
# Modules that count differently from the package they stand in.
EXACT = {"dbtrain": 0}

DOORS = {
    "diffusers": ["dbtrain.families", "dbtrain_embedded"],
    "transformers": ["dbtrain.families", "dbtrain.evaluate", "dbtrain_embedded"],
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
    """Every module of the four packages with its file."""
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


def layer(name: str, modules: set[str]) -> int | None:
    """The layer of an imported name: that of the longest listed prefix; None for code that is not ours."""
    if name.split(".")[0] not in SOURCES:
        return None
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    if name in EXACT:
        return EXACT[name]
    listed = [
        (len(prefix), rank)
        for rank, names in LAYERS.items()
        for prefix in names
        if is_within(name, prefix) and prefix != "dbtrain"
    ]
    return max(listed)[1] if listed else None


def upward_imports(files: dict[str, Path]) -> list[str]:
    """A line for every import that points up."""
    modules = set(files)
    found = []
    for module, path in files.items():
        own = layer(module, modules)
        for name, line in imported_names(ast.parse(path.read_text("utf-8")), module, path.name == "__init__.py"):
            target = layer(name, modules)
            if own is not None and target is not None and target > own:
                found.append(f"{module}:{line} (layer {own}) imports {name} (layer {target})")
    return found


def wrong_doors(files: dict[str, Path]) -> list[str]:
    """A line for every import of a library by a module that is not its door."""
    found = []
    for module, path in files.items():
        for name, line in imported_names(ast.parse(path.read_text("utf-8")), module, path.name == "__init__.py"):
            doors = DOORS.get(name.split(".")[0])
            if doors is not None and not any(is_within(module, door) for door in doors):
                found.append(f"{module}:{line} imports {name}; only {', '.join(doors)} may")
    return found


def foreign_imports(files: dict[str, Path]) -> list[str]:
    """A line for every import of `dbtrain_embedded` from our other packages that is not of `dbtrain.tiny`."""
    return [
        f"{module}:{line} imports {name}"
        for module, path in files.items()
        if is_within(module, "dbtrain_embedded")
        for name, line in imported_names(ast.parse(path.read_text("utf-8")), module, path.name == "__init__.py")
        if name.split(".")[0] in {*SOURCES} - {"dbtrain_embedded"} and not is_within(name, "dbtrain.tiny")
    ]


def test_the_making_of_the_embedded_base_imports_only_its_paths():
    assert foreign_imports(source_files()) == []


@pytest.mark.parametrize("text", ["from dbtrain import atomic", "import dbtrain.batch", "import dbtrain_kernels"])
def test_foreign_imports_are_seen(tmp_path, text):
    path = tmp_path / "one.py"
    path.write_text(f"from dbtrain.tiny import BASE\n{text}\n")
    assert len(foreign_imports({"dbtrain_embedded.world": path, "dbtrain.train": path})) == 1


def test_every_module_has_a_layer():
    files = source_files()
    assert [name for name in files if layer(name, set(files)) is None] == []


def test_imports_point_down():
    assert upward_imports(source_files()) == []


def test_one_door_per_library():
    assert wrong_doors(source_files()) == []


@pytest.mark.parametrize(
    "text, module, expected",
    [
        ("import dbtrain.train", "dbtrain.step", "imports dbtrain.train"),
        ("from dbtrain import train", "dbtrain.step", "imports dbtrain.train"),
        ("from .. import cli", "dbtrain.data.stream", "imports dbtrain.cli"),
        ("from . import train", "dbtrain.step", "imports dbtrain.train"),
        ("def f():\n    from dbtrain.cli import main", "dbtrain.fleet.driver", "imports dbtrain.cli.main"),
        ("import dbtrain_launchers.__main__", "dbtrain.cli", "imports dbtrain_launchers.__main__"),
        ("from dbtrain_embedded.recipe import main", "dbtrain.families.sd", "imports dbtrain_embedded.recipe"),
    ],
)
def test_upward_imports_are_seen(tmp_path, text, module, expected):
    path = tmp_path / "one.py"
    path.write_text(text)
    names = ("dbtrain.train", "dbtrain.cli", "dbtrain_embedded.recipe", "dbtrain_launchers.__main__")
    known = dict.fromkeys(names, path)
    (tmp_path / "none.py").write_text("")
    files = dict.fromkeys(known, tmp_path / "none.py") | {module: path}
    assert [expected in line for line in upward_imports(files)] == [True]


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
    assert upward_imports({**source_files(), "dbtrain.families.sd": path}) == []


@pytest.mark.parametrize(
    "module",
    [
        "dbtrain",
        "dbtrain.cli",
        "dbtrain.config",
        "dbtrain.configfile",
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
