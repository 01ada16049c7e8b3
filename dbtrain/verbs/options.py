"""What the verbs share: common options, groups, help with examples, and printing for scripts.

Each file of verbs has one table or two, by the names on the command line: `VERBS`, and `APPS` with groups of verbs.
"""

import inspect
import json
import os
import signal
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dbtrain.errors import StopRequested
from dbtrain.machine import take_signals
from dbtrain.storage.atomic import write_file

if TYPE_CHECKING:
    from dbtrain.settings.config import RunConfig

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Manifest = Annotated[Path, typer.Argument(help="CSV, JSONL, YAML or Parquet: subject, class, images.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Settings to replace.")]
Recipe = Annotated[str, typer.Option("--config", help="Recipe of the training: a shipped one's name, or a file.")]
Protocol = Annotated[
    str, typer.Option(help="`quick`: the recipe's sample prompts; `dreambooth`: the paper's 25 prompts, 4 images each.")
]
Identity = Annotated[str, typer.Option(metavar="ENC", help="Encoder for DINO: a folder, a hub id, or `embedded`.")]
Clip = Annotated[str, typer.Option(metavar="ENC", help="Encoder of pictures and texts, the same way.")]
Distance = Annotated[str, typer.Option(help="Of DIV: `lpips`, `dreamsim`, `patches`; `auto` is LPIPS where it works.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave subjects with findings out, naming each.")]
PublishTo = Annotated[
    str | None, typer.Option(metavar="URL", help="Where to upload finished subjects: a folder, s3://, gs://, abfs://.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]


class Verb(NamedTuple):
    """A verb of the command line: its function, its examples (one command a line), and click's settings of it."""

    run: Callable[..., Any]
    examples: str
    context: dict[str, Any] | None = None


def add_verbs(app: typer.Typer, verbs: Mapping[str, Verb]) -> None:
    """Add verbs to an application by their names. A verb's help is the docstring of its function with the examples."""
    for name, verb in verbs.items():
        text = _with_examples(inspect.getdoc(verb.run) or "", verb.examples)
        app.command(name, help=text, context_settings=verb.context)(verb.run)


def group(text: str, example: str, verbs: Mapping[str, Verb], **settings: Any) -> typer.Typer:
    """A group of verbs with its help; `settings` are further ones of typer."""
    app = typer.Typer(help=_with_examples(text, example), no_args_is_help=True, rich_markup_mode=None, **settings)
    add_verbs(app, verbs)
    return app


def _with_examples(text: str, examples: str) -> str:
    # For click, \b begins a paragraph whose lines stay as they are.
    return f"{text}\n\n\b\nExample:\n{textwrap.indent(examples, '  ')}"


def load_config(recipe: str, overrides: Sequence[str] | None) -> "RunConfig":
    """The settings of a recipe, with those that the command line replaces."""
    from dbtrain.settings import recipes

    return recipes.load(recipe, overrides or ())


def load_settled(recipe: str, overrides: Sequence[str] | None) -> "RunConfig":
    """The settings as `load_config`, with the base's own family; ConfigError for a base that cannot be trained."""
    from dbtrain.models.recognition import settled

    return settled(load_config(recipe, overrides))


def with_address(overrides: Sequence[str] | None, publish_to: str | None) -> list[str] | None:
    """The settings that a command replaces, with `--publish-to` as the setting that it stands for."""
    return [*(overrides or ())] + ([f"publish.to={publish_to}"] if publish_to is not None else [])


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def keep_origin(
    out: Path, verb: str, manifest: Path, recipe: str, overrides: Sequence[str] | None, skip_bad: bool
) -> None:
    """Write the run's last command to OUT/run.json; the report shows it as the command that resumes the run.

    Call this only for a command whose settings and manifest were accepted: a refused one would be refused again.
    """
    words = {"verb": verb, "manifest": str(manifest), "config": recipe, "out": str(out)}
    content = json.dumps({**words, "overrides": [*(overrides or ())], "skip_bad": skip_bad}, indent=1).encode()
    if not (out / "run.json").exists() or (out / "run.json").read_bytes() != content:
        write_file(out / "run.json", content)


def stop_at_once() -> None:
    """Let SIGTERM and SIGUSR1 end this process at once, with the exit code that means "run me again".

    For work whose every file appears whole or not at all. Training handles these signals itself once it has begun.
    """

    def stop(*_: object) -> None:
        os.write(2, b"stopped on request; run the same command to go on\n")
        raise SystemExit(StopRequested.exit_code)

    take_signals((signal.SIGTERM, signal.SIGUSR1), stop)
