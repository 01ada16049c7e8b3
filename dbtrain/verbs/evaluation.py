"""The verb that scores finished subjects: evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from dbtrain.errors import ConfigError, DataError
from dbtrain.verbs.options import Clip, Distance, Identity, Json, Overrides, Protocol, Quiet, Verb, print_json


def evaluate_verb(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of a training, or one OUT/subjects/ID.")],
    protocol: Protocol = "quick",
    images: Annotated[int | None, typer.Option(min=1, help="Images a prompt, if not the protocol's own.")] = None,
    class_images: Annotated[int | None, typer.Option(min=1, help="Class images for PRES: 4 (quick) or 25.")] = None,
    identity: Identity = "embedded",
    clip: Clip = "embedded",
    distance: Distance = "auto",
    live: Annotated[str, typer.Option(metavar="NOUNS", help="Further class nouns of live subjects: `gnome,imp`.")] = "",
    objects: Annotated[str, typer.Option(metavar="NOUNS", help="Class nouns to be taken as objects: `duck`.")] = "",
    subject: Annotated[list[str] | None, typer.Option(help="Only this subject; repeat for more.")] = None,
    shards: Annotated[Path | None, typer.Option(help="Folder of the photos, if they moved.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 8,
    quiet: Quiet = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Score finished subjects by the DreamBooth paper's protocol: DINO, CLIP-I, CLIP-T, PRES, DIV, with intervals.

    Pictures are kept under DIR, so the same command again draws only what is missing. Results: DIR/evaluation.json and
    DIR/subjects/ID/evaluation.json.
    """
    from dbtrain.evaluate import protocol as protocols
    from dbtrain.evaluate.summary import evaluate, text_table
    from dbtrain.subjects.prompts import LIVE_CLASSES

    if protocol not in protocols.PROTOCOLS:
        raise ConfigError(f"--protocol: got {protocol!r}, want {' or '.join(protocols.PROTOCOLS)}")
    asked = protocols.Protocol(
        protocol=protocol,
        images=images,
        class_images=class_images,
        identity=identity,
        clip=clip,
        distance=distance,
        live=(LIVE_CLASSES | nouns(live)) - nouns(objects),
        overrides=tuple(overrides or ()),
        batch=batch,
        shards=shards,
    )
    scores = evaluate(folder, asked, subject or (), lambda line: None if quiet else typer.echo(line, err=True))
    print_json(scores) if as_json else typer.echo(text_table(scores))
    if scores["failed"]:
        raise DataError("\n".join(f"{name}: {reason}" for name, reason in scores["failed"].items()))


def nouns(text: str) -> frozenset[str]:
    """The nouns of a comma-separated list, case folded."""
    return frozenset(" ".join(noun.casefold().split()) for noun in text.split(",") if noun.strip())


VERBS = {
    "evaluate": Verb(evaluate_verb, """\
dbtrain evaluate runs/all
dbtrain evaluate runs/all --protocol dreambooth --identity facebook/dino-vits16 \\
  --clip openai/clip-vit-base-patch32"""),
}  # fmt: skip
