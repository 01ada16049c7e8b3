"""The verbs about settings and this machine: config, identifiers, migrate, doctor."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dbtrain.errors import ConfigError
from dbtrain.verbs.options import Json, Overrides, Verb, group, load_config, print_json


def config_show(recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a file.")],
                overrides: Overrides = None, as_json: Json = False) -> None:
    """Print a recipe with every setting resolved."""
    from dbtrain.settings import recipes

    config = load_config(recipe, overrides)
    print_json(config.model_dump(mode="json")) if as_json else typer.echo(recipes.render(config), nl=False)


def config_schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from dbtrain.settings import recipes

    print_json(recipes.schema())


def config_recipes(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from dbtrain.settings import recipes

    names = recipes.recipe_names()
    print_json(names) if as_json else typer.echo("\n".join(names))


def config_check(names: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Names or files.")]) -> None:
    """Check recipes and report everything that is wrong in all of them."""
    findings: list[str] = []
    for name in names:
        try:
            load_config(name, ())
        except ConfigError as error:
            findings += error.findings
        else:
            typer.echo(f"{name}: ok")
    if findings:
        raise ConfigError(findings)


def identifiers_verb(
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT...]", help="Identifiers to explain.")] = None,
    model: Annotated[str, typer.Option(help="Model or tokenizer: a folder, a hub id, or `embedded`.")] = "embedded",
    count: Annotated[int, typer.Option(min=1, help="How many candidates to list without TEXT.")] = 20,
    as_json: Json = False,
) -> None:
    """List a model's rare tokens, or explain how it reads a text and whether that text is a good identifier."""
    from dataclasses import asdict

    from dbtrain.models.load import load_tokenizer
    from dbtrain.subjects import identifiers

    tokenizer = load_tokenizer(model)
    if texts:
        explained = [identifiers.explain(tokenizer, text) for text in texts]
        rows = [asdict(answer) for answer in explained]
        pieces = [", ".join(f"{token} {rank}" for token, rank in zip(a.tokens, a.ranks)) for a in explained]
        lines = [f"{a.text}: {a.verdict}: {a.reason} ({read})" for a, read in zip(explained, pieces)]
    else:
        candidates = identifiers.candidates(tokenizer)[:count]
        rows = [asdict(candidate) for candidate in candidates]
        lines = [f"{candidate.text:<4} {candidate.rank}" for candidate in candidates]
    print_json(rows) if as_json else typer.echo("\n".join(lines))


def migrate_verb(
    command_line: Annotated[list[str] | None, typer.Argument(
        metavar="[COMMAND...]", help="The command line, after our options; from standard input when left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for recipe.yaml and manifest.yaml.")] = None,
    as_json: Json = False,
) -> None:
    """Turn a command line of diffusers' DreamBooth scripts or kohya's trainers into a recipe and a manifest."""
    import shlex

    from dbtrain.verbs.migrate import migrate

    result = migrate(shlex.join(command_line) if command_line else sys.stdin.read())
    if out:
        _write_new(out, {"recipe.yaml": result.recipe_yaml, "manifest.yaml": result.manifest_yaml})
    if as_json:
        print_json(result._asdict())
        return
    if not out:
        typer.echo(f"# recipe.yaml\n{result.recipe_yaml}\n# manifest.yaml\n{result.manifest_yaml}", nl=False)
    for kind, lines in (("dropped", result.dropped), ("note", result.notes)):
        for line in lines:
            typer.echo(f"{kind}: {line}", err=True)


def _write_new(folder: Path, files: dict[str, str]) -> None:
    """Write files into a folder, never over another file."""
    present = [name for name in files if (folder / name).exists()]
    if present:
        raise ConfigError(f"{folder}: already has {' and '.join(present)}; choose another folder for --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from None
    typer.echo(f"wrote {', '.join(str(folder / name) for name in files)}", err=True)


def doctor_verb(
    model: Annotated[str | None, typer.Option(help="Also examine this base model.")] = None,
    as_json: Json = False,
) -> None:
    """Examine this machine: versions, devices, compilers, disk; what is wrong and what to do."""
    from dataclasses import asdict

    from dbtrain.verbs.doctor import examine

    checks = examine(model)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            typer.echo(f"{check.state:<5} {check.name}: {check.detail}" + (f"; {check.remedy}" if check.remedy else ""))
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)


APPS = {
    "config": group("Show, check and describe settings.", "dbtrain config show tiny train.steps=400", {
        "show": Verb(config_show, "dbtrain config show sd15_lora train.steps=400 lora.rank=8 > my.yaml"),
        "schema": Verb(config_schema, "dbtrain config schema > configs/schema.json"),
        "recipes": Verb(config_recipes, "dbtrain config recipes"),
        "check": Verb(config_check, "dbtrain config check configs/recipes/*.yaml"),
    })
}  # fmt: skip
FOREIGN = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""Settings of a verb whose arguments are another program's command line."""
VERBS = {
    "identifiers": Verb(
        identifiers_verb, "dbtrain identifiers --model stable-diffusion-v1-5/stable-diffusion-v1-5 sks unique"
    ),
    "migrate": Verb(migrate_verb, "dbtrain migrate --out rex < train.sh", FOREIGN),
    "doctor": Verb(doctor_verb, "dbtrain doctor --json"),
}
