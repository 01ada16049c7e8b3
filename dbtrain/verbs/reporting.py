"""The verb that shows a run: report."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from dbtrain.verbs.options import Json, Verb, print_json


def report_verb(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="What was --out of `train`, `batch run` or `demo`.")],
    watch: Annotated[bool, typer.Option("--watch", help="Keep it up to date until the run ends, or Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=1, help="With --watch: seconds between looks.")] = 10,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a device hour, for the cost chart.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make every page and thumbnail anew.")] = False,
    as_json: Json = False,
) -> None:
    """Make the pages of a run: summary, table and gallery of its subjects, a page for each. Opens without a network."""
    from dataclasses import asdict

    from dbtrain.report import Built, rebuild

    def show(built: Built) -> None:
        if as_json:
            print_json({**asdict(built), "index": str(built.index)})
        else:
            pages = f"{built.made} pages made, {built.kept} unchanged"
            typer.echo(f"{built.index}: {built.subjects} subjects, {pages}, {built.seconds:.1f} s")

    if not watch:
        show(rebuild(run, price=price, fresh=fresh))
        return
    try:
        for look in count():
            built = rebuild(run, refresh_s=round(max(every, 2)), price=price, fresh=fresh and not look)
            if built.made or not look:
                show(built)
            if built.over:
                break
            time.sleep(every)
    finally:  # however the watch ends, the pages that remain do not reload themselves
        show(rebuild(run, price=price))


VERBS = {
    "report": Verb(report_verb, "dbtrain report runs/dogs\ndbtrain report runs/dogs --watch --every 30 --price 2.10")
}
