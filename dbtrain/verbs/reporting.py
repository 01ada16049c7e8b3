"""The verb that shows a run: report."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from dbtrain.verbs.options import Json, print_json


def report_verb(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="What was --out of `train`, `batch run` or `demo`.")],
    watch: Annotated[bool, typer.Option("--watch", help="Keep it up to date until the run ends, or Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=1, help="With --watch: seconds between looks.")] = 10,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a device hour, for the cost chart.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make every page and thumbnail anew.")] = False,
    as_json: Json = False,
) -> None:
    """Make the pages of a run: summary, table and gallery of its subjects, a page for each. Opens without a network.

    \b
    Example:
      dbtrain report runs/dogs
      dbtrain report runs/dogs --watch --every 30 --price 2.10
    """
    from dataclasses import asdict

    from dbtrain.report import Built, rebuild

    def tell(built: Built) -> None:
        if as_json:
            print_json({**asdict(built), "index": str(built.index)})
        else:
            typer.echo(
                f"{built.index}: {built.subjects} subjects, {built.made} pages made, {built.kept} unchanged, "
                f"{built.seconds:.1f} s"
            )

    if not watch:
        tell(rebuild(run, price=price, fresh=fresh))
        return
    try:
        for look in count():
            built = rebuild(run, refresh_s=round(max(every, 2)), price=price, fresh=fresh and not look)
            if built.made or not look:
                tell(built)
            if built.over:
                break
            time.sleep(every)
    finally:  # however it ends, what is left behind does not reload itself
        tell(rebuild(run, price=price))


VERBS: dict[str, Callable[..., None]] = {"report": report_verb}
"""Every verb of this file by its name on the command line."""
