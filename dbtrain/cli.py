"""The `dbtrain` command: verbs only. Each parses its words, calls one function and prints what comes back.

Modules are imported inside the verbs, so that `dbtrain --help` answers at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dbtrain.errors import ConfigError, DataError, DbtrainError, EngineError
from dbtrain.storage.trouble import disk_trouble, memory_trouble
from dbtrain.verbs import batch, bench, evaluation, launch, reporting, stores, subjects
from dbtrain.verbs.options import Json, Overrides, print_json

INTERRUPTED = 130

EXIT_CODES = """Exit codes: 0 done; 1 other failure; 2 wrong settings or usage; 3 manifest, photos, shards or artefacts;
4 training cannot go on; 5 cluster; 75 stopped on request (SIGTERM, SIGUSR1): requeue;
130 interrupted. The same command again resumes."""


class Verbs(TyperGroup):
    """A group of verbs that prints a DbtrainError as `error:` lines and turns it into its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DbtrainError as error:
            if ctx.params.get("traceback"):
                raise
            for line in str(error).splitlines():
                typer.echo(f"error: {line}", err=True)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            memory = memory_trouble(error)
            trouble = memory or disk_trouble(error)
            if trouble is None or ctx.params.get("traceback"):
                raise
            typer.echo(f"error: {trouble}", err=True)
            raise typer.Exit((EngineError if memory else DataError).exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(cls=Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  rich_markup_mode=None, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
config_app = typer.Typer(no_args_is_help=True, help="Show, check and describe settings.\n\n"
                         "\b\nExample:\n  dbtrain config show tiny train.steps=400", rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(launch.app, name="launch")
app.add_typer(bench.app, name="bench")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line (None is the process's own) and exits with its code."""
    app(args=arguments, prog_name="dbtrain")


def _version(wanted: bool) -> None:
    if wanted:
        from dbtrain import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[bool, typer.Option(
        "--version", help="Print the version.", callback=_version, is_eager=True)] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    """Personalize text-to-image models: a few photos and a class noun in, a model that knows the subject out.

    \b
    Example:
      dbtrain train photos.csv --subject rex --config sd15_lora --out runs/rex
    """


@config_app.command("show")
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


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a recipe, for editors.

    \b
    Example:
      dbtrain config schema > configs/schema.json
    """
    from dbtrain.settings import recipes

    print_json(recipes.schema())


@config_app.command("recipes")
def config_recipes(as_json: Json = False) -> None:
    """List the shipped recipes.

    \b
    Example:
      dbtrain config recipes
    """
    from dbtrain.settings import recipes

    names = recipes.recipe_names()
    print_json(names) if as_json else typer.echo("\n".join(names))


@config_app.command("check")
def config_check(recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Names or files.")]) -> None:
    """Check recipes and report everything that is wrong in all of them.

    \b
    Example:
      dbtrain config check configs/recipes/*.yaml
    """
    from dbtrain.settings.recipes import load

    findings: list[str] = []
    for recipe in recipes:
        try:
            load(recipe)
        except ConfigError as error:
            findings += error.findings
        else:
            typer.echo(f"{recipe}: ok")
    if findings:
        raise ConfigError(findings)


@app.command("identifiers")
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


@app.command("migrate", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
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


@app.command("doctor")
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


for name, group in {**stores.APPS, **batch.APPS}.items():
    app.add_typer(group, name=name)
for theme in (subjects, evaluation, reporting):
    for name, verb in theme.VERBS.items():
        app.command(name)(verb)
