"""What a wheel of dbtrain holds, and that the repository hides nobody else's package."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ROOTS = {
    "dbtrain": "dbtrain",
    "dbtrain_kernels": "kernels/dbtrain_kernels",
    "dbtrain_launchers": "launchers/dbtrain_launchers",
}


FOLDERS = ("dbtrain", "kernels", "launchers", "embedded", "configs")
"""What a wheel is built beside: `embedded` is no part of it."""
NEEDED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", *FOLDERS)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the sources: building leaves the checkout as it was, and nobody's edit falls between two looks."""
    place = tmp_path_factory.mktemp("copy")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / name, place)
    return place


def names(folder: Path, pattern: str = "*") -> set[str]:
    """Names of the files in a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file()}


@pytest.fixture(scope="module")
def unpacked(copy, tmp_path_factory) -> Path:
    """A wheel's content, as an installation lays it out."""
    work = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
    ]
    built = subprocess.run([*command, "-w", str(work), str(copy)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    with zipfile.ZipFile(next(work.glob("*.whl"))) as archive:
        archive.extractall(work / "site")
    return work / "site"


@pytest.fixture(scope="module")
def wheel(unpacked) -> dict[str, int]:
    """Names and sizes of what a wheel holds."""
    return {name: (unpacked / name).stat().st_size for name in names(unpacked)}


def test_the_wheel_holds_every_module_and_nothing_else_on_top(copy, wheel):
    modules = {f"{name}/{file}" for name, root in ROOTS.items() for file in names(copy / root, "*.py")}
    assert modules - set(wheel) == set()
    assert {top for name in wheel if not (top := name.split("/")[0]).endswith(".dist-info")} == set(ROOTS)


def test_the_wheel_leaves_out_how_the_embedded_base_is_made(copy, wheel):
    assert names(copy / "embedded", "*.py")
    assert [name for name in wheel if "dbtrain_embedded" in name] == []
    assert {name for name in wheel if name.startswith("dbtrain/tiny/") and name.endswith(".py")} == {
        "dbtrain/tiny/__init__.py"
    }


def test_the_wheel_holds_the_configuration_files(copy, wheel):
    assert {"dbtrain/configs/" + name for name in names(copy / "configs")} <= set(wheel)
    assert "dbtrain/configs/recipes/tiny.yaml" in wheel


def test_the_wheel_holds_the_assets(copy, wheel):
    assets = names(copy / "dbtrain/tiny/assets")
    assert assets
    assert {"dbtrain/tiny/assets/" + name for name in assets} <= set(wheel)


def test_what_is_installed_finds_its_recipes_without_the_checkout(unpacked, tmp_path):
    code = "import dbtrain, dbtrain_kernels, dbtrain_launchers.on_deepspeed; from dbtrain.settings import recipes; "
    code += "recipes.load('tiny'); print(dbtrain.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == (str(unpacked / "dbtrain" / "__init__.py"), "")


def test_the_wheel_is_small_enough_to_ship(wheel):
    assert sum(wheel.values()) < 100 * 2**20


def test_the_metadata_is_right():
    shown = subprocess.run(
        [sys.executable, "setup.py", "-q", "--name", "--version", "--license"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    import dbtrain

    assert shown[-3:] == ["dbtrain", dbtrain.__version__, "Apache-2.0"]


@pytest.mark.slow
def test_nothing_in_the_repository_root_hides_a_library():
    """transformers imports the PyPI package `kernels` where it is installed; one of ours by that name breaks it."""
    run = subprocess.run(
        [sys.executable, "-c", "from transformers import CLIPTextModel"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_constraints_cover_what_setup_requires():
    """Each requirement of every extra that `make` installs has one pinned version, and the pin satisfies its bound."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for line in asked_for("REQUIRES") + asked_for("EXTRAS", "test") + asked_for("EXTRAS", "dev"):
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "0")), line


def asked_for(table: str, key: str | None = None) -> list[str]:
    """A literal list of setup.py, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    found = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == table)
    value = ast.literal_eval(found)
    return value[key] if key else value


def test_torchvision_is_never_asked_for():
    """Its wheel replaces or breaks a CPU build of torch."""
    everything = [
        *asked_for("REQUIRES"),
        *(line for key in ("test", "gpu", "eval", "dev") for line in asked_for("EXTRAS", key)),
    ]
    assert not [line for line in everything if line.startswith(("torchvision", "lpips", "torchmetrics"))]
