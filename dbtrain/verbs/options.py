"""What the verbs share: common options, and printing for scripts."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dbtrain.errors import StopRequested
from dbtrain.machine import take_signals
from dbtrain.storage.atomic import write_file

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Settings to replace.")]
Recipe = Annotated[str, typer.Option("--config", help="Recipe of the training: a shipped one's name, or a file.")]
Protocol = Annotated[
    str, typer.Option(help="`quick`: the recipe's sample prompts; `dreambooth`: the paper's 25 prompts, 4 images each.")
]
Identity = Annotated[
    str, typer.Option(metavar="ENC", help="Encoder in DINO's role: a folder, a hub id, or `embedded`.")
]
Clip = Annotated[str, typer.Option(metavar="ENC", help="Encoder of pictures and texts, the same way.")]
Distance = Annotated[
    str, typer.Option(help="Of DIV: `lpips`, `dreamsim`, `patches`; `auto` is LPIPS where it works.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave subjects with findings out, naming each.")]


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def keep_origin(
    out: Path, verb: str, manifest: Path, recipe: str, overrides: Sequence[str] | None, skip_bad: bool
) -> None:
    """Nothing; afterwards OUT/run.json holds the words of the run's last command, with which the report says how to
    resume. Only for a command that was let in: one that is refused would be refused again."""
    words = {"verb": verb, "manifest": str(manifest), "config": recipe, "out": str(out)}
    found = json.dumps({**words, "overrides": [*(overrides or ())], "skip_bad": skip_bad}, indent=1).encode()
    if not (out / "run.json").exists() or (out / "run.json").read_bytes() != found:
        write_file(out / "run.json", found)


def stop_at_once() -> None:
    """Nothing; from now on SIGTERM and SIGUSR1 end this process at once, with the code that means "run me again".

    For work whose every file appears whole or not at all. Training takes these signals over when it opens its session.
    """

    def stop(*_: object) -> None:
        os.write(2, b"stopped on request; run the same command to go on\n")
        raise SystemExit(StopRequested.exit_code)

    take_signals((signal.SIGTERM, signal.SIGUSR1), stop)
