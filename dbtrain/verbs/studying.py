"""The verb that compares recipes: study."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dbtrain.errors import ConfigError, DataError
from dbtrain.verbs.options import (
    Clip,
    Distance,
    Identity,
    Json,
    Manifest,
    Overrides,
    Quiet,
    Recipe,
    Verb,
    print_json,
    stop_at_once,
)
from dbtrain.verbs.options import Protocol as ProtocolOption


def study_verb(
    manifest: Manifest,
    out: Annotated[Path, typer.Option(help="Output folder; running again with the same one resumes.")],
    recipe: Recipe,
    vary: Annotated[list[str], typer.Option(metavar="KEY=V1,V2", help="Values of a setting; repeat for more keys.")],
    grid: Annotated[bool, typer.Option("--grid", help="Every combination; else one key at a time.")] = False,
    random: Annotated[int | None, typer.Option(min=1, help="So many combinations, drawn at random.")] = None,
    halve: Annotated[bool, typer.Option("--halve", help="Drop on the way what is clearly worse.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Train by a fleet of so many workers.")] = None,
    good: Annotated[float | None, typer.Option(help="Identity (DINO) that a recipe must reach.")] = None,
    pres: Annotated[float | None, typer.Option(help="PRES that it must not exceed.")] = None,
    subjects: Annotated[int, typer.Option(min=1, help="Subjects of the runs to come, for their cost.")] = 1000,
    classes: Annotated[int, typer.Option(min=1, help="Classes of these.")] = 1,
    protocol: ProtocolOption = "quick",
    images: Annotated[int | None, typer.Option(min=1, help="Images a prompt, if not the protocol's own.")] = None,
    class_images: Annotated[int | None, typer.Option(min=1, help="Class images for PRES: 4 (quick) or 25.")] = None,
    identity: Identity = "embedded",
    clip: Clip = "embedded",
    distance: Distance = "auto",
    quiet: Quiet = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train variants of a recipe on pilot subjects, score them, and say which is the cheapest that is good enough.

    Variants that differ in rate, steps, rank, prior weight or seed train as rows of common packs. Results: the page
    DIR/study.html, DIR/study.json, and DIR/recipe.yaml, the cheapest recipe that reaches --good and keeps --pres.
    """
    stop_at_once()
    from dbtrain.evaluate.protocol import PROTOCOLS, Protocol
    from dbtrain.fleet.options import Options
    from dbtrain.fleet.run import run_batch
    from dbtrain.report.study_page import write_page
    from dbtrain.study.findings import Goal, text_table
    from dbtrain.study.running import Study
    from dbtrain.study.telling import as_found, tell, write_found
    from dbtrain.study.variants import Design, read_vary
    from dbtrain.training.session import Watch

    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol: got {protocol!r}, want {' or '.join(PROTOCOLS)}")
    if grid and random is not None:
        raise ConfigError("--grid, --random: give one of them")
    scored_by = Protocol(protocol, images, class_images, identity, clip, distance=distance)
    design = Design(recipe, tuple(overrides or ()), tuple(map(read_vary, vary)), grid, random)
    fleet = partial(run_batch, options=Options(workers, quiet=quiet)) if workers else None
    study = Study(design, manifest, out, scored_by, Watch(quiet), Goal(good, pres), halve, fleet)
    told = tell(study, subjects, classes)
    write_found(told)
    write_page(out / "study.html", told)
    if as_json:
        print_json(as_found(told))
    else:
        lines = [text_table(told.table, told.goal), "", *(effect.text for effect in told.effects), "", *told.costs]
        none, best = "no variant is good enough", told.chosen
        chosen = f"cheapest that is good enough: {best.variant.title}; {out / 'recipe.yaml'}" if best else none
        typer.echo("\n".join([*lines, chosen, f"look at {out / 'study.html'}"]))
    if study.failed:
        raise DataError("\n".join(f"{name}: {reason}" for name, reason in study.failed.items()))


VERBS = {
    "study": Verb(study_verb, """\
dbtrain study pilots.csv --config sd15_lora --vary train.lr=1e-4,2e-4 --vary train.steps=300,600 --grid \\
  --good 0.6 --pres 0.4 --out runs/study""")
}  # fmt: skip
