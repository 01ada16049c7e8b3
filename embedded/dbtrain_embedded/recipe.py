"""`PYTHONPATH=embedded python -m dbtrain_embedded.recipe STAGE --work DIR [--minutes M]` makes the embedded base.

Stages, in order: atlas, demo (both read downloaded sources), pool, tokenizer, clip, vae, identity, latents, unet,
decoder, vision, upscaler, export. decoder, vision and upscaler can run at the same time as unet. The same command again
resumes a training stage from its checkpoint in DIR; more minutes continue a finished stage. `restore`, run after pool,
replaces the stages from clip to latents: the later stages then train on from the shipped weights. Training uses an
accelerator where there is one.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dbtrain.tiny import ASSETS, BASE

MINUTES = {"clip": 8.0, "vae": 25.0, "identity": 6.0, "vision": 12.0, "unet": 60.0, "decoder": 20.0, "upscaler": 10.0}
"""Default minutes of the training stages; enough on two CPU cores that nothing else uses."""


def _atlas(options) -> None:
    from dbtrain_embedded import sprites

    training = tuple(vendor for vendor in sprites.VENDORS if vendor not in sprites.HELD_OUT)
    print("training sprites:", sprites.build(options.packages, training, ASSETS / "atlas" / "train"))
    print("held-out sprites:", sprites.build(options.packages, sprites.HELD_OUT, ASSETS / "atlas" / "heldout"))


def _demo(options) -> None:
    from dbtrain_embedded import demo

    demo.build_drawn()
    if options.dataset:
        demo.build_real(options.dataset)


def _pool(options) -> None:
    from dbtrain_embedded import pool

    pool.draw(options.work, options.scenes, workers=options.crew)


def _tokenizer(options) -> None:
    from dbtrain_embedded import vocabulary

    target = BASE / "tokenizer"
    if target.exists():
        raise SystemExit(
            f"{target} exists and the shipped weights belong to it: ties in BPE training fall differently each time. "
            "Remove the folder to train a new tokenizer, and every other stage after it."
        )
    print("tokens:", len(vocabulary.build(target)))


def _train(options) -> None:
    from dbtrain_embedded import autoencoder, denoiser, encoders, upscaler
    from dbtrain_embedded.loops import with_crew

    minutes, tokenizer = options.minutes or MINUTES[options.stage], str(BASE / "tokenizer")
    stages: dict[str, tuple[Callable[..., object], list]] = {
        "clip": (encoders.train_clip, [minutes, tokenizer]),
        "vision": (encoders.train_clip, [minutes, tokenizer, True]),
        "vae": (autoencoder.train, [minutes]),
        "identity": (encoders.train_identity, [minutes]),
        "unet": (denoiser.train, [minutes, tokenizer]),
        "decoder": (autoencoder.train_decoder, [minutes]),
        "upscaler": (upscaler.train, [minutes]),
    }
    stage, arguments = stages[options.stage]
    if options.lr:
        stage = partial(stage, lr=options.lr)
    with_crew(stage, options.work, *arguments, size=options.crew)


def _latents(options) -> None:
    from dbtrain_embedded import denoiser

    denoiser.write_latents(options.work)


def _restore(options) -> None:
    from dbtrain_embedded import export

    export.restore(options.work)


def _export(options) -> None:
    from dbtrain_embedded import export

    export.export(options.work)


STAGES = {
    "atlas": _atlas,
    "demo": _demo,
    "pool": _pool,
    "tokenizer": _tokenizer,
    "clip": _train,
    "vae": _train,
    "identity": _train,
    "vision": _train,
    "latents": _latents,
    "restore": _restore,
    "unet": _train,
    "decoder": _train,
    "upscaler": _train,
    "export": _export,
}


def main(arguments: list | None = None) -> None:
    """Run the stage that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m dbtrain_embedded.recipe", description=__doc__)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--work", type=Path, default=Path("tinybuild"), help="folder of pools, checkpoints and the log")
    parser.add_argument(
        "--minutes", type=float, help=f"minutes of a training stage in all, earlier runs of it included {MINUTES}"
    )
    parser.add_argument("--lr", type=float, help="highest learning rate of a training stage, instead of its default")
    parser.add_argument(
        "--crew", type=int, default=2, help="single-threaded processes that share a stage's batch on a CPU"
    )
    parser.add_argument("--scenes", type=int, default=60_000, help="scenes in the pool")
    parser.add_argument("--packages", type=Path, help="the unpacked @iconify-json folder (stage atlas)")
    parser.add_argument("--dataset", type=Path, help="the google/dreambooth data set (stage demo, real subjects)")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
