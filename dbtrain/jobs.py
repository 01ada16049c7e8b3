"""The verbs that work on subjects: preflight, shard, prior, train, generate, export, demo."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dbtrain.errors import ConfigError, DataError, EngineError
from dbtrain.terminal import Json, Overrides, Recipe, print_json


def preflight_verb(
    manifest: Annotated[Path, typer.Argument(help="CSV, JSONL, YAML or Parquet: subject, class, images.")],
    recipe: Recipe = "tiny",
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Look at every row and every photo of a manifest and list what is wrong; nothing is written.

    \b
    Example:
      dbtrain preflight photos.csv --config sd15_lora --json
    """
    from dbtrain import configfile
    from dbtrain.data.manifest import scan_manifest
    from dbtrain.data.preflight import preflight

    subjects, findings = scan_manifest(manifest)
    findings += preflight(subjects, configfile.load(recipe, overrides or ()))
    if as_json:
        print_json([finding.row() for finding in findings])
    if findings:
        raise DataError("\n".join(finding.line() for finding in findings))
    if not as_json:
        typer.echo(f"{manifest}: {len(subjects)} subjects, nothing to complain about")


def shard_verb(
    manifest: Annotated[Path, typer.Argument(help="CSV, JSONL, YAML or Parquet; or, with --verify, a shard folder.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the shards.")] = None,
    recipe: Annotated[str, typer.Option("--config", help="Recipe whose data.resolution holds.")] = "tiny",
    verify: Annotated[bool, typer.Option("--verify", help="Check a shard folder instead of writing one.")] = False,
    overrides: Overrides = None,
) -> None:
    """Write a manifest's photos as WebDataset shards with an index, or verify a folder of them.

    \b
    Example:
      dbtrain shard photos.csv --out shards --config sd15_lora
      dbtrain shard shards --verify
    """
    from dbtrain.data.shards import shard_manifest
    from dbtrain.data.stream import verify as damage_of

    if verify:
        damage = damage_of(manifest)
        if damage:
            raise DataError("\n".join(damage))
        typer.echo(f"{manifest}: sound")
        return
    if out is None:
        raise ConfigError("--out: is missing; give the folder for the shards")
    from dbtrain import configfile

    shard_manifest(manifest, out, configfile.load(recipe, overrides or ()), typer.echo)


def prior_verb(
    manifest: Annotated[Path, typer.Argument(help="Manifest whose classes get priors.")],
    out: Annotated[Path, typer.Option(help="Folder of the prior store.")],
    recipe: Annotated[str, typer.Option("--config", help="Recipe: model, sampler and number of images.")] = "tiny",
    overrides: Overrides = None,
) -> None:
    """Draw the class images that prior preservation needs; training makes what is missing by itself.

    \b
    Example:
      dbtrain prior photos.csv --out priors --config sd15_lora prior.images=100
    """
    from dbtrain import configfile
    from dbtrain.session import make_class_priors

    config = configfile.load(recipe, overrides or ())
    for class_noun, count in make_class_priors(manifest, config, out).items():
        typer.echo(f"{class_noun}: {count} images drawn, {config.prior.images} in the store")


def train_verb(
    manifest: Annotated[Path, typer.Argument(help="CSV, JSONL, YAML or Parquet: subject, class, images.")],
    out: Annotated[Path, typer.Option(help="Output folder; running again with the same one resumes.")],
    recipe: Recipe,
    subject: Annotated[list[str] | None, typer.Option(help="Subject id; repeat for more.")] = None,
    subjects: Annotated[str | None, typer.Option(help="`all` takes every row.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Personalize the base model for subjects of a manifest. The same command again resumes or does nothing.

    \b
    Example:
      dbtrain train photos.csv --subject rex --config sd15_lora --out runs/rex train.steps=600
      deepspeed --num_gpus 2 launchers/train.py photos.csv --subjects all --config sdxl_lora --out runs/all
    """
    from dbtrain import configfile

    if subjects not in (None, "all") or bool(subject) == bool(subjects):
        raise ConfigError("--subject, --subjects: give --subject ID (it repeats), or --subjects all")
    config = configfile.load(recipe, overrides or ())
    from dbtrain.train import train_manifest

    records, failed = train_manifest(manifest, config, out, subject, quiet)
    if as_json:
        print_json(records)
    else:
        for record in records:
            folder = out / "subjects" / record["subject"]
            typer.echo(f"{record['subject']}: `{record['identifier']} {record['class']}` in {folder}")
    if failed:
        raise EngineError("\n".join(f"{name}: {reason}" for name, reason in failed.items()))


def generate_verb(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Finished subjects: OUT/subjects/ID.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt with {subject}; repeat for more.")] = None,
    name: Annotated[str, typer.Option(help="Name of the sheet.")] = "generated",
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=c", help="Setting to replace, such as sample.seed=7.")
    ] = None,
) -> None:
    """Draw images of finished subjects; many adapters share one loaded base.

    \b
    Example:
      dbtrain generate runs/all/subjects/* --prompt "a photo of {subject} in the snow" --set sample.images=4
    """
    from dbtrain.generate import generate_finished

    for sheet in generate_finished(folders, prompt, setting or (), name):
        typer.echo(sheet)


def export_verb(
    folder: Annotated[Path, typer.Argument(help="Finished LoRA subject: OUT/subjects/ID, or an adapter file.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
) -> None:
    """Write an adapter with the key names of kohya-ss and ComfyUI.

    \b
    Example:
      dbtrain export runs/rex/subjects/rex --out ComfyUI/models/loras/rex.safetensors
    """
    from dbtrain.publish import export_kohya, read_lora

    weights, metadata = read_lora(folder)
    provenance = {key: value for key, value in metadata.items() if key not in ("format", "lora_adapter_metadata")}
    typer.echo(export_kohya(out, weights, provenance))


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
    from dbtrain.demo import run_demo, table

    result = run_demo(out, recipe, overrides or (), everything)
    typer.echo(table(result["records"]))
    typer.echo(f"{result['seconds']:.0f} s in all, at most {result['peak_memory_gib']:.1f} GiB of memory")
    for sheet in result["sheets"]:
        typer.echo(f"look at {sheet}")


VERBS: dict[str, Callable[..., None]] = {
    "preflight": preflight_verb,
    "shard": shard_verb,
    "prior": prior_verb,
    "train": train_verb,
    "generate": generate_verb,
    "export": export_verb,
    "demo": demo_verb,
}
"""Every verb of this file by its name on the command line."""
