"""The verbs of what runs share: `shard` (photos under digests) and `prior` (class images)."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dbtrain.errors import ConfigError, DataError
from dbtrain.verbs.options import (
    Json,
    Manifest,
    Overrides,
    Recipe,
    SkipBad,
    Verb,
    group,
    load_config,
    load_settled,
    print_json,
    stop_at_once,
)


class WithMake(TyperGroup):
    """A group whose verb `make` may be left out: `dbtrain shard MANIFEST` is `dbtrain shard make MANIFEST`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["make", *args])


def _fail_if(damage: list[str], place: object, as_json: bool) -> None:
    """Say that a place is sound; if it is not, print or raise its damage."""
    if as_json:
        print_json(damage)
    if damage:
        raise DataError("\n".join(damage))
    if not as_json:
        typer.echo(f"{place}: sound")


def shard_make(
    manifest: Manifest,
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    recipe: Recipe,
    skip_bad: SkipBad = False,
    overrides: Overrides = None,
) -> None:
    """Write a manifest's photos as WebDataset shards with an index of digests. `make` may be left out."""
    stop_at_once()
    from dbtrain.subjects.manifest import scan_manifest
    from dbtrain.subjects.sharding import shard_subjects

    config = load_config(recipe, overrides)
    subjects, findings = scan_manifest(manifest, config.data.shards is None)
    shard_subjects(subjects, findings, out, config, typer.echo, skip_bad)


def shard_index(
    tars: Annotated[list[Path], typer.Argument(metavar="TAR...", help="Tars with members such as 1.jpg and 1.txt.")],
    subject: Annotated[str, typer.Option(help="Id of the subject that their photos show.")],
    class_noun: Annotated[str, typer.Option("--class", help="Class noun, such as dog.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    recipe: Recipe,
) -> None:
    """Write the photos and captions of tars made elsewhere as shards with an index; use them as data.shards."""
    stop_at_once()
    from dbtrain.subjects.columns import check_class
    from dbtrain.subjects.finding import CellError
    from dbtrain.subjects.tars import index_tars

    try:
        noun = check_class(class_noun, out)
    except CellError as bad:
        raise ConfigError(f"--class: {bad.args[0]}, want {bad.args[1]}; {bad.args[2]}") from bad
    config = load_config(recipe, ())
    index = index_tars(tars, subject, noun, config.data, out, typer.echo)
    typer.echo(f"{out}: {len(index.entries)} samples of {subject} in {len(index.shards)} shards")


def shard_verify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Shard folder; or an address, with --scheme.")],
    scheme: Annotated[
        list[str] | None, typer.Option(help="Scheme of an address that may be read: file, memory, s3, gs, az, abfs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a shard folder: its index, every shard and every sample, against their digests."""
    from dbtrain.data.stream import verify

    _fail_if(verify(folder, tuple(scheme or ())), folder, as_json)


def prior_make(
    manifest: Annotated[Path, typer.Argument(help="Manifest whose classes get priors.")],
    out: Annotated[Path, typer.Option(help="Folder of the prior store.")],
    recipe: Recipe,
    overrides: Overrides = None,
) -> None:
    """Draw the class images that prior preservation needs; training makes what is missing. `make` may be left out."""
    stop_at_once()
    from dbtrain.subjects.manifest import read_manifest
    from dbtrain.training.session import make_class_priors

    config = load_settled(recipe, overrides)
    classes = {subject.class_noun for subject in read_manifest(manifest, config.data.shards is None)}
    for class_noun, count in make_class_priors(classes, config, out).items():
        typer.echo(f"{class_noun}: {count} images drawn, {config.prior.images} in the store")


def prior_ls(
    store: Annotated[Path, typer.Argument(help="Folder of the prior store.")],
    as_json: Json = False,
) -> None:
    """List what a prior store holds: classes, numbers of images, and what they were drawn with."""
    from dbtrain.priors.store import list_store

    rows = list_store(store)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        how = f"{row['sampler']}, {row['steps']} steps, guidance {row['guidance']:g}, {row['precision']}, "
        how += f"seed {row['seed']}, model {row['model'][:12]}"
        how = "own images" if row["sampler"] == "imported" else how
        size = row["bytes"] / 2**20
        typer.echo(f"{row['prompt']!r}: {row['images']} images of {row['resolution']} px, {size:.1f} MiB; {how}")


def prior_verify(
    store: Annotated[Path, typer.Argument(help="Folder of the prior store.")],
    as_json: Json = False,
) -> None:
    """Check a prior store: keys, images and encoded images, against their digests."""
    from dbtrain.priors.store import store_damage

    _fail_if(store_damage(store), store, as_json)


def prior_import(
    folder: Annotated[Path, typer.Argument(help="Folder of photos of the class.")],
    class_noun: Annotated[str, typer.Option("--class", help="Class noun, such as dog.")],
    out: Annotated[Path, typer.Option(help="Folder of the prior store.")],
    recipe: Recipe,
    overrides: Overrides = None,
) -> None:
    """Bring own class images into a store; train with prior.sampler=imported prior.store=STORE to use them."""
    stop_at_once()
    from dbtrain.priors.own_images import import_images

    new, there = import_images(folder, class_noun, out, load_settled(recipe, overrides), typer.echo)
    typer.echo(f"{class_noun}: {new} images imported, {there} in the store; set prior.images to {there} or less")


MAKE = {"cls": WithMake, "context_settings": {"ignore_unknown_options": True}}
APPS = {
    "shard": group("Photos as WebDataset shards under digests: make them, index foreign tars, verify them.",
                   "dbtrain shard photos.csv --out shards --config sd15_lora", {
        "make": Verb(shard_make, "dbtrain shard make photos.csv --out shards --config sd15_lora"),
        "index": Verb(shard_index, "dbtrain shard index r-*.tar --subject rex --class dog --out shards --config tiny"),
        "verify": Verb(shard_verify, """\
dbtrain shard verify runs/rex/shards
dbtrain shard verify s3://bucket/shards --scheme s3"""),
    }, **MAKE),
    "prior": group("Class images for prior preservation: make, list, verify, import.",
                   "dbtrain prior photos.csv --out priors --config sd15_lora", {
        "make": Verb(prior_make, "dbtrain prior make photos.csv --out priors --config sd15_lora prior.images=100"),
        "ls": Verb(prior_ls, "dbtrain prior ls priors"),
        "verify": Verb(prior_verify, "dbtrain prior verify priors"),
        "import": Verb(prior_import, "dbtrain prior import photos/dogs --class dog --out priors --config sd15_lora"),
    }, **MAKE),
}  # fmt: skip
