"""The `dbtrain` command. Each verb parses its arguments, calls one function and prints the result.

Verbs import what they need when they run, so that `dbtrain --help` answers at once.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dbtrain.errors import DataError, DbtrainError, EngineError
from dbtrain.storage.trouble import disk_trouble, memory_trouble
from dbtrain.verbs import batch, bench, evaluation, importing, launch, reporting, settings, stores, studying, subjects
from dbtrain.verbs.options import add_verbs

INTERRUPTED = 130

EXIT_CODES = """Exit codes: 0 done; 1 other failure; 2 wrong settings or usage; 3 manifest, photos, shards or artefacts;
4 training cannot go on; 5 cluster; 75 stopped on request (SIGTERM, SIGUSR1, first Ctrl-C): requeue;
130 interrupted (second Ctrl-C). The same command again resumes."""


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line (None is this process's own) and exit with its code."""
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


THEMES = (subjects, evaluation, studying, reporting, settings, stores, importing, batch, bench, launch)
for theme in THEMES:
    for name, group in getattr(theme, "APPS", {}).items():
        app.add_typer(group, name=name)
    add_verbs(app, getattr(theme, "VERBS", {}))
