"""The verbs that work on subjects: preflight, train, generate, export, demo."""

import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dbtrain.errors import ConfigError, DataError, summed
from dbtrain.verbs.options import (
    Json,
    Manifest,
    Overrides,
    PublishTo,
    Quiet,
    Recipe,
    SkipBad,
    Verb,
    keep_origin,
    load_settled,
    print_json,
    stop_at_once,
    with_address,
)


def preflight_verb(
    manifest: Manifest,
    recipe: Recipe,
    overrides: Overrides = None,
    skip_bad: SkipBad = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Page to write, such as sheet.html: each photo as it will be trained.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at every row and every photo of a manifest and list what is wrong; nothing is written but the --sheet.

    With --skip-bad this succeeds if any subject is sound; `train --skip-bad` leaves the listed subjects out.
    """
    from dbtrain.models.load import load_tokenizer
    from dbtrain.results.uploading import refuse_address
    from dbtrain.settings.stages import largest_side
    from dbtrain.subjects.finding import defects, notes, refuse
    from dbtrain.subjects.manifest import scan_manifest
    from dbtrain.subjects.preflight import sift
    from dbtrain.training.telemetry import refuse_trackers

    config = load_settled(recipe, overrides)
    refuse_trackers(config.track)
    refuse_address(config.publish)
    config = config.replaced("data.resolution", largest_side(config))
    tokenizer = None
    try:
        tokenizer = load_tokenizer(config.model.single_file_layout or config.model.path)
    except DataError as error:  # photos can be looked at where the base is not
        typer.echo(f"captions and identifiers are not checked: {error}", err=True)
    found = scan_manifest(manifest, config.data.shards is None)
    subjects, findings = sift(*found, config, tokenizer)
    if sheet is not None:
        if config.data.shards is not None:
            raise ConfigError("--sheet: shows a manifest's own photos, and data.shards is set; take one of the two out")
        from dbtrain.report.photo_sheet import write_sheet

        write_sheet(sheet, found[0], findings, config)
        typer.echo(f"look at {sheet}", err=True)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    for finding in notes(findings):
        typer.echo(f"note: {finding.line()}", err=True)
    wrong = defects(findings)
    if not (skip_bad and subjects):
        refuse(wrong)
    for finding in wrong:
        typer.echo(f"left out: {finding.line()}", err=True)
    if not as_json:
        bad, said = len({finding.subject for finding in wrong}), len(notes(findings))
        verdict = f"{bad} left out" if bad else "nothing to complain about"
        typer.echo(f"{manifest}: {len(subjects)} subjects, {verdict}{f', {said} notes' if said else ''}")


def train_verb(
    manifest: Manifest,
    out: Annotated[Path, typer.Option(help="Output folder; running again with the same one resumes.")],
    recipe: Recipe,
    subject: Annotated[list[str] | None, typer.Option(help="Subject id; repeat for more.")] = None,
    subjects: Annotated[str | None, typer.Option(help="`all` takes every row.")] = None,
    publish_to: PublishTo = None,
    skip_bad: SkipBad = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say which engine would train here, and why.")] = False,
    quiet: Quiet = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Personalize the base model for subjects of a manifest. The same command again resumes or does nothing."""
    stop_at_once()
    if subjects not in (None, "all") or bool(subject) == bool(subjects):
        raise ConfigError("--subject, --subjects: give --subject ID (it repeats), or --subjects all")
    from dbtrain.settings.marks import anchored

    overrides = with_address(overrides, publish_to)
    config = anchored(load_settled(recipe, overrides))
    if plan:
        from dbtrain.engines.kind import engine_here
        from dbtrain.subjects.manifest import read_manifest

        typer.echo(engine_here(config, int(os.environ.get("WORLD_SIZE", "1")), read_manifest(manifest)))
        return
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


SETS = (
    "A sheet of prompts for one application: recontext, views, properties, accessories, art; tiny, in the words of the "
    "embedded base; or a .yaml file. Repeat for more."
)


def generate_verb(
    words: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER... [a.b=c ...]", help="Finished subjects (OUT/subjects/ID), and settings."),
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt with {subject}; repeat for more.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME", help=SETS),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the sheet without --set.")] = "generated",
    negative: Annotated[
        str | None, typer.Option(help="What the pictures are to keep away from: the negative prompt of guidance.")
    ] = None,
    weight: Annotated[
        float, typer.Option(min=-4, max=4, help="How much of the adapter is added to the base; 0 is the base alone.")
    ] = 1.0,
    picture: Annotated[
        list[Path] | None, typer.Option(help="Picture to enlarge, for a subject of an upscaler alone; repeat for more.")
    ] = None,
) -> None:
    """Draw images of finished subjects; many adapters share one loaded base."""
    from dbtrain.results.finished import generate_finished

    settings = [word for word in words if "=" in word and not Path(word).exists()]
    folders = [Path(word) for word in words if word not in settings]
    if not folders:
        raise ConfigError("FOLDER: is missing; give a finished subject, OUT/subjects/ID")
    if prompt and sets:
        raise ConfigError("--prompt, --set: give one of them")
    for sheet in generate_finished(folders, prompt, settings, name, sets or (), negative, weight, picture or ()):
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
    """
    from dbtrain.results.exporting import export

    typer.echo(export(folder, out, family))


def push_verb(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Finished subject: OUT/subjects/ID.")],
    to: Annotated[str, typer.Option(metavar="USER/NAME", help="Repository; made if there is none, then private.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see a repository that is made.")] = False,
) -> None:
    """Send a finished subject to a model hub, in one commit: Hugging Face, or the one at HF_ENDPOINT."""
    from dbtrain.results.hub import push

    typer.echo(push(folder, to, public))


def demo_verb(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("demo-out"),
    recipe: Recipe = "tiny_packed",
    everything: Annotated[bool, typer.Option("--all", help="All ten drawn subjects, then two photographed.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train both stages for eight drawn subjects, on the small models that come with dbtrain; score and show them."""
    from dbtrain.evaluate.summary import text_table
    from dbtrain.verbs.demo import run_demo, table

    shown = run_demo(out, recipe, overrides or (), everything)
    typer.echo(table(shown.records))
    for scores in shown.scores:
        typer.echo(f"\n{text_table(scores)}")
    spent = f"{shown.seconds:.0f} s in all, {time.process_time():.0f} processor seconds"
    typer.echo(f"\n{spent}; at most {shown.peak_memory_gib:.1f} GiB of memory")
    typer.echo("\n".join(f"look at {path}" for path in (*shown.sheets, *shown.reports)))
    if failed := {row["subject"]: row["failed"] for row in shown.records if "failed" in row}:
        raise summed(failed)


VERBS = {
    "preflight": Verb(preflight_verb, """\
dbtrain preflight photos.csv --config sd15_lora --json
dbtrain preflight photos.csv --config sd15_lora --sheet sheet.html"""),
    "train": Verb(train_verb, """\
dbtrain train photos.csv --subject rex --config sd15_lora --out runs/rex train.steps=600
deepspeed --num_gpus 2 launchers/train.py photos.csv --subjects all --config sd15_full_zero2 --out runs/all"""),
    "generate": Verb(generate_verb, """\
dbtrain generate runs/all/subjects/* --prompt "a photo of {subject} in the snow" sample.images=4
dbtrain generate runs/rex/subjects/rex --set recontext --set art"""),
    "export": Verb(export_verb, "dbtrain export runs/rex/subjects/rex --out ComfyUI/models/loras/rex.safetensors"),
    "push": Verb(push_verb, "dbtrain push runs/rex/subjects/rex --to someone/rex-lora"),
    "demo": Verb(demo_verb, "dbtrain demo --out demo-out"),
}  # fmt: skip
