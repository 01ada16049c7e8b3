"""The verbs that work on subjects: preflight, shard, prior, train, generate, export, demo."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dbtrain.errors import ConfigError, DataError, summed
from dbtrain.verbs.options import Json, Overrides, Recipe, SkipBad, keep_origin, print_json, stop_at_once


def preflight_verb(
    manifest: Annotated[Path, typer.Argument(help="CSV, JSONL, YAML or Parquet: subject, class, images.")],
    recipe: Recipe,
    overrides: Overrides = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Look at every row and every photo of a manifest and list what is wrong; nothing is written.

    With --skip-bad it succeeds if any subject is sound: what is listed is what `train --skip-bad` leaves out.

    \b
    Example:
      dbtrain preflight photos.csv --config sd15_lora --json
    """
    from dbtrain.families import FAMILIES
    from dbtrain.models.load import load_tokenizer, refuse_base
    from dbtrain.settings import recipes
    from dbtrain.subjects.preflight import sift
    from dbtrain.training.telemetry import refuse_trackers

    config = recipes.load(recipe, overrides or ())
    refuse_trackers(config.track)
    refuse_base(FAMILIES[config.model.family], config.model)
    tokenizer = None
    try:
        tokenizer = load_tokenizer(config.model.single_file_layout or config.model.path)
    except DataError as error:  # photos can be looked at where the base is not
        typer.echo(f"captions and identifiers are not checked: {error}", err=True)
    subjects, findings = sift(manifest, config, tokenizer)
    if as_json:
        print_json([finding.row() for finding in findings])
    if findings and not (skip_bad and subjects):
        raise DataError("\n".join(finding.line() for finding in findings))
    for finding in findings:
        typer.echo(f"left out: {finding.line()}", err=True)
    if not as_json:
        bad = len({finding.subject for finding in findings})
        typer.echo(f"{manifest}: {len(subjects)} subjects, {f'{bad} left out' if bad else 'nothing to complain about'}")


def train_verb(
    manifest: Annotated[Path, typer.Argument(help="CSV, JSONL, YAML or Parquet: subject, class, images.")],
    out: Annotated[Path, typer.Option(help="Output folder; running again with the same one resumes.")],
    recipe: Recipe,
    subject: Annotated[list[str] | None, typer.Option(help="Subject id; repeat for more.")] = None,
    subjects: Annotated[str | None, typer.Option(help="`all` takes every row.")] = None,
    skip_bad: SkipBad = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Personalize the base model for subjects of a manifest. The same command again resumes or does nothing.

    \b
    Example:
      dbtrain train photos.csv --subject rex --config sd15_lora --out runs/rex train.steps=600
      deepspeed --num_gpus 2 launchers/train.py photos.csv --subjects all --config sd15_full_zero2 --out runs/all
    """
    from dbtrain.settings import recipes

    stop_at_once()
    if subjects not in (None, "all") or bool(subject) == bool(subjects):
        raise ConfigError("--subject, --subjects: give --subject ID (it repeats), or --subjects all")
    from dbtrain.fleet.options import anchored

    config = anchored(recipes.load(recipe, overrides or ()))
    from dbtrain.train import train_manifest

    opened = partial(keep_origin, out, "train", manifest, recipe, overrides, skip_bad)
    records, failed = train_manifest(manifest, config, out, subject, quiet, skip_bad, opened)
    if as_json:
        print_json(records)
    else:
        for record in records:
            folder = out / "subjects" / record["subject"]
            typer.echo(f"{record['subject']}: `{record['identifier']} {record['class']}` in {folder}")
    if failed:
        raise summed(failed)


def generate_verb(
    words: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER... [a.b=c ...]", help="Finished subjects (OUT/subjects/ID), and settings."),
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt with {subject}; repeat for more.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME",
            help="A sheet of prompts for one application: recontext, views, properties, accessories, art; tiny, in the "
            "words of the embedded base; or a .yaml file. Repeat for more.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the sheet without --set.")] = "generated",
    negative: Annotated[
        str | None, typer.Option(help="What the pictures are to keep away from: the negative prompt of guidance.")
    ] = None,
    weight: Annotated[
        float, typer.Option(min=-4, max=4, help="How much of the adapter is added to the base; 0 is the base alone.")
    ] = 1.0,
) -> None:
    """Draw images of finished subjects; many adapters share one loaded base.

    \b
    Example:
      dbtrain generate runs/all/subjects/* --prompt "a photo of {subject} in the snow" sample.images=4
      dbtrain generate runs/rex/subjects/rex --set recontext --set art
    """
    from dbtrain.results.finished import generate_finished

    settings = [word for word in words if "=" in word and not Path(word).exists()]
    folders = [Path(word) for word in words if word not in settings]
    if not folders:
        raise ConfigError("FOLDER: is missing; give a finished subject, OUT/subjects/ID")
    if prompt and sets:
        raise ConfigError("--prompt, --set: give one of them")
    for sheet in generate_finished(folders, prompt, settings, name, sets or (), negative, weight):
        typer.echo(sheet)


def export_verb(
    folder: Annotated[
        Path,
        typer.Argument(help="Finished subject: OUT/subjects/ID; an adapter of any trainer; a diffusers folder."),
    ],
    out: Annotated[str, typer.Option(help="File to write, or a folder: the file then has the subject's name.")],
    family: Annotated[
        str | None, typer.Option(help="Family of the base, such as sd or sdxl, where the names do not tell it.")
    ] = None,
) -> None:
    """Write an adapter with the key names of kohya-ss and ComfyUI, or a fully fine-tuned model as one checkpoint file.

    Adapters of kohya, PEFT, diffusers and ComfyUI are read too. Whole models: Stable Diffusion 1, 2 and XL.

    \b
    Example:
      dbtrain export runs/rex/subjects/rex --out ComfyUI/models/loras/rex.safetensors
    """
    from dbtrain.results.exporting import export

    typer.echo(export(folder, out, family))


def demo_verb(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("demo-out"),
    recipe: Recipe = "tiny",
    everything: Annotated[bool, typer.Option("--all", help="Every demo subject, not just the first ones.")] = False,
    overrides: Overrides = None,
) -> None:
    """Personalize the embedded base for its demo subjects, drawn and real, on this machine as it is.

    \b
    Example:
      dbtrain demo --out demo-out
    """
    from dbtrain.evaluate.summary import text_table
    from dbtrain.verbs.demo import run_demo, table

    shown = run_demo(out, recipe, overrides or (), everything)
    typer.echo(table(shown.records))
    for scores in shown.scores:
        typer.echo(f"\n{text_table(scores)}")
    typer.echo(
        f"\n{shown.seconds:.0f} s in all, {shown.evaluation_s:.0f} s of it for the scores; "
        f"at most {shown.peak_memory_gib:.1f} GiB of memory"
    )
    for path in (*shown.sheets, *shown.reports):
        typer.echo(f"look at {path}")
    if failed := {each["subject"]: each["failed"] for each in shown.records if "failed" in each}:
        raise summed(failed)


VERBS: dict[str, Callable[..., None]] = {
    "preflight": preflight_verb,
    "train": train_verb,
    "generate": generate_verb,
    "export": export_verb,
    "demo": demo_verb,
}
"""Every verb of this file by its name on the command line."""
