"""The documents: links lead somewhere, commands are understood, and the README's first run runs."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

from dbtrain import cli
from dbtrain.settings import recipes
from dbtrain.tiny import DEMO

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [path for folder in ("dbtrain", "kernels", "launchers") for path in sorted((ROOT / folder).rglob("*.py"))]
PLACEHOLDERS = {"DIR": "runs/all", "OUT": "runs/all", "STORE": "priors", "RECIPE": "tiny", "MANIFEST": "photos.csv"}


def named(page):
    return page.relative_to(ROOT).as_posix()


def blocks(text, language):
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def anchor(heading):
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(page):
    """GitHub's names of the page's headings."""
    return [anchor(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, part = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"\w+:", link):
            continue
        if not target.exists() or (part and part not in headings(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_are_named_exist(page):
    """Paths in code marks that begin with a folder of the sources."""
    text = page.read_text("utf-8")
    folders = r"(?:dbtrain|kernels|launchers|tests|benchmarks|configs|docs|embedded)"
    paths = re.findall(rf"`({folders}/[\w/.-]+)`", text)
    if page.name == "CHANGELOG.md":
        return  # it also names files of the past
    assert [path for path in paths if not (ROOT / path).exists()] == []


def names_in(path):
    """Functions, classes, their methods, top-level variables and imported names of a source file, dotted."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        found |= {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_names_in_files_exist(page):
    """`file::name` in code marks."""
    places = re.findall(r"`([\w/.]+\.py)::([\w.]+)`", page.read_text("utf-8"))
    files = {path: names_in(ROOT / path) if (ROOT / path).exists() else set() for path, _ in places}
    assert [f"{path}::{name}" for path, name in places if name not in files[path]] == []


def place_of(dotted):
    """(source file, name in it) of a dotted name of ours; the name is empty for a module or package."""
    parts = dotted.split(".")
    folder = ROOT / "kernels" / parts[0] if parts[0] == "dbtrain_kernels" else ROOT / parts[0]
    parts = parts[1:]
    while parts and (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    if parts and (folder / f"{parts[0]}.py").exists():
        return folder / f"{parts[0]}.py", ".".join(parts[1:])
    return folder / "__init__.py", ".".join(parts)


@pytest.mark.parametrize("page", [*PAGES, *SOURCES], ids=named)
def test_dotted_names_exist(page):
    """`dbtrain.module.name` in code marks, in pages and in sources."""
    if page.name == "CHANGELOG.md":
        return  # it also names what was there in the past
    dotted = re.findall(r"`(dbtrain(?:_kernels)?(?:\.\w+)+)", page.read_text("utf-8"))
    places = {name: place_of(name) for name in dotted}
    assert [name for name, (path, part) in places.items() if part and part not in names_in(path)] == []


def commands():
    """(page, line) of every command of ours in a block of code; continued lines are joined."""
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        fenced = "\n".join(blocks(text, r"\w*"))
        for line in re.findall(r"^(dbtrain .*)$", fenced, re.M) + re.findall(r"^ {4}(dbtrain .*)$", text, re.M):
            words = re.sub(r"\s#.*|\s<.*|\[--.*", "", line).strip()
            if "..." not in words:
                yield pytest.param(words, id=f"{named(page)}: {words[:60]}")


def parse(words):
    """The context that the command line makes of the words, without a run."""
    command, context = typer.main.get_command(cli.app), None
    while True:
        name = words[0] if words else command.name
        if not hasattr(command, "commands"):
            return command.make_context(name, list(words), parent=context)
        context = command.make_context(command.name or "dbtrain", list(words), parent=context, resilient_parsing=True)
        command, words = command.get_command(context, words[0]), words[1:]
        assert command is not None, name


@pytest.mark.parametrize("line", list(commands()))
def test_commands_are_understood(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line)[1:]]
    context = parse(words)
    if "--" in words:
        context = parse(words[words.index("--") + 1 :])
    given = context.params
    recipe = given.get("config") or given.get("recipe")
    if recipe in recipes.recipe_names():
        recipes.load(recipe, given.get("overrides") or ())


def test_wrong_commands_are_seen():
    with pytest.raises(Exception, match="No such option"):
        parse(shlex.split("train photos.csv --subject rex --konfig tiny --out runs"))
    with pytest.raises(AssertionError, match="trian"):
        parse(["trian"])


ONE_PROCESS = """
import json, sys
from dbtrain import cli
for words in json.loads(sys.argv[1]):
    try:
        cli.main(words)
    except SystemExit as end:
        if end.code:
            raise
"""
"""Runs several command lines and loads the libraries only once."""


@pytest.mark.slow
def test_the_first_run_of_the_readme_runs(tmp_path):
    """Its manifest and commands to the letter, but on the small model and for a few steps."""
    text = README.read_text("utf-8")
    (manifest,), lines = blocks(text, "csv"), [line for block in blocks(text, "sh")[:2] for line in block.splitlines()]
    (tmp_path / "photos.csv").write_text(manifest)
    (tmp_path / "photos").mkdir()
    for subject, demo in (("rex", "dog-tan"), ("vase", "teapot-red")):
        (tmp_path / "photos" / subject).mkdir()
        for photo in (DEMO.parent / demo).iterdir():
            Image.open(photo).convert("RGB").save(tmp_path / "photos" / subject / f"{photo.stem}.jpg")
    quick = ["train.steps=2", "prior.images=4", "prior.steps=2", "sample.steps=2"]
    words = [shlex.split(line.replace("sd15_lora", "tiny"))[1:] for line in lines]
    words = [[*line, *quick] if line[0] == "train" else line for line in words]
    command = [sys.executable, "-c", ONE_PROCESS, json.dumps(words)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    rex = tmp_path / "runs/mine/subjects/rex"
    assert (rex / "pytorch_lora_weights.safetensors").exists() and (rex / "evaluation.json").exists()
    assert (tmp_path / "runs/mine/report/index.html").exists()


def test_every_recipe_is_in_the_table_of_recipes():
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    assert [name for name in recipes.recipe_names() if f"`{name}`" not in text] == []


def test_the_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) < 110
