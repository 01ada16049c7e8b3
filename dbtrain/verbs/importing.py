"""The verbs of what other tools laid out: `import`."""

from pathlib import Path
from typing import Annotated

import typer

from dbtrain.errors import ConfigError
from dbtrain.verbs.options import Overrides, Verb, group, load_config, stop_at_once

Folder = Annotated[Path, typer.Argument(help="Folder as the other tool wants it.")]
Out = Annotated[Path, typer.Option(help="Manifest to write, a .jsonl file.")]
Noun = Annotated[str | None, typer.Option("--class", help="Class noun where the folder names none.")]
Store = Annotated[Path | None, typer.Option(help="Prior store to bring regularization images into; needs --config.")]
MaybeRecipe = Annotated[str | None, typer.Option("--config", help="Recipe of the training, for --store.")]


def import_kohya(
    folder: Folder,
    out: Out,
    class_noun: Noun = None,
    store: Store = None,
    recipe: MaybeRecipe = None,
    overrides: Overrides = None,
) -> None:
    """Make a manifest of folders such as `10_zorbo gadget`; with --store, import `reg` too."""
    from dbtrain.priors.own_images import import_images
    from dbtrain.subjects.foreign import from_kohya, import_class_images

    stop_at_once()
    if (store is None) != (recipe is None):
        raise ConfigError("--store, --config: give both, or none of them")
    imported = from_kohya(folder, class_noun)
    if store is not None:
        config = load_config(str(recipe), overrides)
        import_class_images(imported, lambda place, noun: import_images(place, noun, store, config, typer.echo))
    else:
        for noun, places in imported.class_images.items():
            for place in places:
                command = f'dbtrain prior import "{place}" --class "{noun}" --out STORE --config RECIPE'
                imported.said.append(f"class images of {noun!r}: `{command}`, then train with prior.sampler=imported")
    imported.write(out)
    _say(imported.said, len(imported.rows), out)


def import_imagefolder(folder: Folder, out: Out, class_noun: Noun = None) -> None:
    """Make a manifest of a folder of photos, or of folders of photos; `metadata.jsonl` has their captions."""
    from dbtrain.subjects.foreign import from_imagefolder

    stop_at_once()
    imported = from_imagefolder(folder, class_noun)
    imported.write(out)
    _say(imported.said, len(imported.rows), out)


def _say(said: list[str], subjects: int, out: Path) -> None:
    for line in said:
        typer.echo(line)
    typer.echo(f"{out}: {subjects} subjects; look at them with `dbtrain preflight {out} --config RECIPE`")


APPS = {
    "import": group(
        "Make a manifest of a folder that was laid out for another tool.",
        "dbtrain import kohya trainings/zorbo --out manifest.jsonl",
        {
            "kohya": Verb(
                import_kohya,
                "dbtrain import kohya trainings/zorbo --out manifest.jsonl\n"
                "dbtrain import kohya trainings/zorbo --out manifest.jsonl --store priors --config sd15_lora",
            ),
            "imagefolder": Verb(
                import_imagefolder, "dbtrain import imagefolder photos/zorbo --class gadget --out manifest.jsonl"
            ),
        },
    )
}
"""Every group of this file by its name on the command line."""
