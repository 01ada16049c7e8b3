"""The verbs about settings and this machine: config, identifiers, migrate, doctor."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dbtrain.errors import ConfigError
from dbtrain.verbs.options import Json, Overrides, print_json

config_app = typer.Typer(
    no_args_is_help=True,
    help="Show, check and describe settings.\n\n\b\nExample:\n  dbtrain config show tiny train.steps=400",
    rich_markup_mode=None,
)


def config_show(recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a file.")],
                overrides: Overrides = None, as_json: Json = False) -> None:
    """Print a recipe with every setting resolved.

    \b
    Example:
      dbtrain config show sd15_lora train.steps=400 lora.rank=8 > my.yaml
    """
    from dbtrain.settings import recipes

    config = recipes.load(recipe, overrides or ())
    print_json(config.model_dump(mode="json")) if as_json else typer.echo(recipes.render(config), nl=False)


def config_schema() -> None:
    """Print the JSON schema of a recipe, for editors.

    \b
    Example:
      dbtrain config schema > configs/schema.json
    """
    from dbtrain.settings import recipes

    print_json(recipes.schema())


def config_recipes(as_json: Json = False) -> None:
    """List the shipped recipes.

    \b
    Example:
      dbtrain config recipes
    """
    from dbtrain.settings import recipes

    names = recipes.recipe_names()
    print_json(names) if as_json else typer.echo("\n".join(names))


def config_check(names: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Names or files.")]) -> None:
    """Check recipes and report everything that is wrong in all of them.

    \b
    Example:
      dbtrain config check configs/recipes/*.yaml
    """
    from dbtrain.settings import recipes

    findings: list[str] = []
    for name in names:
        try:
            recipes.load(name)
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
    """List a model's rare tokens, or explain how it reads a text and whether that makes a good identifier.

    \b
    Example:
      dbtrain identifiers --model stable-diffusion-v1-5/stable-diffusion-v1-5 sks unique
    """
    from dataclasses import asdict

    from dbtrain.models.load import load_tokenizer
    from dbtrain.subjects import identifiers

    tokenizer = load_tokenizer(model)
    if texts:
        explained = [identifiers.explain(tokenizer, text) for text in texts]
        rows = [asdict(one) for one in explained]
        lines = [f"{one.text}: {one.verdict}: {one.reason} ({_pieces(one.tokens, one.ranks)})" for one in explained]
    else:
        found = identifiers.candidates(tokenizer)[:count]
        rows = [asdict(one) for one in found]
        lines = [f"{one.text:<4} {one.rank}" for one in found]
    print_json(rows) if as_json else typer.echo("\n".join(lines))


def _pieces(tokens: Sequence[str], ranks: Sequence[int]) -> str:
    return ", ".join(f"{token} {rank}" for token, rank in zip(tokens, ranks, strict=True))


def migrate_verb(
    command_line: Annotated[list[str] | None, typer.Argument(
        metavar="[COMMAND...]", help="The command line, after our options; from standard input when left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for recipe.yaml and manifest.yaml.")] = None,
    as_json: Json = False,
) -> None:
    """Turn a diffusers train_dreambooth*.py command line into a recipe and a manifest, and say what is dropped.

    \b
    Example:
      dbtrain migrate --out rex < train.sh
    """
    import shlex

    from dbtrain.verbs.migrate import migrate

    result = migrate(shlex.join(command_line) if command_line else sys.stdin.read())
    if out:
        _write_new(out, {"recipe.yaml": result.recipe_yaml, "manifest.yaml": result.manifest_yaml})
    if as_json:
        print_json(vars(result))
        return
    if not out:
        typer.echo(f"# recipe.yaml\n{result.recipe_yaml}\n# manifest.yaml\n{result.manifest_yaml}", nl=False)
    for kind, lines in (("dropped", result.dropped), ("note", result.notes)):
        for line in lines:
            typer.echo(f"{kind}: {line}", err=True)


def _write_new(folder: Path, files: dict[str, str]) -> None:
    """Writes files into a folder, never over another file."""
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise ConfigError(f"{folder}: already has {' and '.join(there)}; choose another folder for --out")
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
    """Examine this machine: versions, devices, compilers, disk; what is wrong and what to do.

    \b
    Example:
      dbtrain doctor --json
    """
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


CONFIG_VERBS: dict[str, Callable[..., None]] = {
    "show": config_show,
    "schema": config_schema,
    "recipes": config_recipes,
    "check": config_check,
}
for name, verb in CONFIG_VERBS.items():
    config_app.command(name)(verb)
APPS = {"config": config_app}
"""Every group of this file by its name on the command line."""
VERBS: dict[str, Callable[..., None]] = {
    "identifiers": identifiers_verb,
    "migrate": migrate_verb,
    "doctor": doctor_verb,
}
"""Every verb of this file by its name on the command line."""
TAKES_FOREIGN_OPTIONS = ("migrate",)
"""Verbs whose words are another program's command line."""
