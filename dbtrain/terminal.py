"""What the verbs share: common options, and printing for scripts."""

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Settings to replace.")]
Recipe = Annotated[str, typer.Option("--config", help="Name of a shipped recipe, or a file.")]


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
