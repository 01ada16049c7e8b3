"""The verbs under `dbtrain bench`: what the parts of a training cost on this machine."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from dbtrain.errors import ConfigError
from dbtrain.verbs.options import Json, Overrides, Recipe, Verb, group, load_settled, print_json


def pack_verb(
    recipe: Recipe = "tiny",
    sizes: Annotated[str, typer.Option(help="Pack sizes to compare, with commas.")] = "1,2,4,8,16",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of one turn.")] = 3,
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns; medians are reported.")] = 3,
    processes: Annotated[int, typer.Option(min=0, help="Also this many independent processes at once.")] = 0,
    subjects: Annotated[str, typer.Option(help="Subject counts for the fit of T(S), with commas; empty: none.")] = "",
    random_weights: Annotated[bool, typer.Option(help="Random weights in the recipe's family's shape.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write OUT.json and OUT.md.")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Time the subject-packed trainer at several pack sizes against warm solo training, interleaved."""
    from dbtrain.bench import pack, to_stderr

    config = load_settled(recipe, overrides)
    counts = numbers(subjects, "--subjects") if subjects else []
    plan = pack.Plan(numbers(sizes, "--sizes"), steps, turns, processes, counts, random_weights)
    result = pack.measure(config, plan, to_stderr)
    if out:
        pack.write(out, result)
    print_json(result) if as_json else typer.echo(pack.table(result))


def ops_verb(as_json: Json = False) -> None:
    """Count and, on a GPU, time every fused operation beside its plain form, a copy and a matrix product."""
    from dbtrain.bench import ops, to_stderr

    result = ops.measure(to_stderr)
    print_json(result) if as_json else typer.echo(ops.table(result))


def step_verb(
    recipe: Recipe = "tiny",
    capture: Annotated[
        str, typer.Option(help="Ways to run a step, with commas: off, compile, graph, compiled_graph.")
    ] = "off",
    attention: Annotated[str, typer.Option(help="Attentions: auto, sdpa, flash, math, xformers.")] = "sdpa",
    sizes: Annotated[str, typer.Option(help="Pack sizes, with commas.")] = "1",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of one turn.")] = 5,
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns.")] = 3,
    random_weights: Annotated[bool, typer.Option(help="Random weights in the recipe's family's shape.")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Time a whole training step in every way asked for, interleaved: launches, waits, quantiles, MFU."""
    from dbtrain.bench import step, to_stderr
    from dbtrain.settings.config import EngineConfig, ModelConfig

    config = load_settled(recipe, overrides)
    ways = (
        choices(capture, "--capture", EngineConfig.model_fields["capture"].annotation),
        choices(attention, "--attention", ModelConfig.model_fields["attention"].annotation),
    )
    plan = step.Plan(*ways, numbers(sizes, "--sizes"), steps, turns, random_weights)
    result = step.measure(config, plan, to_stderr)
    print_json(result) if as_json else typer.echo(step.table(result))


def model_verb(
    names: Annotated[list[str] | None, typer.Argument(metavar="[MODEL...]", help="Architectures, or families.")] = None,
    card: Annotated[str, typer.Option(help="Cards, with commas: H200, H100, A100, L40S, 4090, T4, MI300X.")] = "H200",
    sizes: Annotated[str, typer.Option(help="Pack sizes, with commas.")] = "1",
    recompute: Annotated[bool, typer.Option("--recompute", help="With train.gradient_checkpointing.")] = False,
    attention: Annotated[str, typer.Option(help="flash (FlashAttention 2), or cudnn, faster on Hopper.")] = "flash",
    as_json: Json = False,
) -> None:
    """Say what a LoRA step of a published architecture would cost on a card: exact counts, modelled milliseconds.

    Needs neither weights nor a GPU. One photo and one prior a subject, bf16, rank 16, the layers of the shipped recipe.
    """
    from dbtrain.bench import roofline, to_nobody

    given = names or ["sd15"], numbers(sizes, "--sizes"), card.split(","), recompute
    rows = roofline.measure(*given, to_nobody, attention)
    print_json(rows) if as_json else typer.echo(roofline.table(rows))


def numbers(text: str, option: str) -> list[int]:
    """The numbers of a list with commas. Raises ConfigError for anything else."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise ConfigError(f"{option}: got {text!r}, want numbers from 1 with commas, such as 1,4,16")
    return [int(word) for word in words]


def choices(text: str, option: str, kind: Any) -> list[str]:
    """The words of a list with commas, each one that the setting of this kind knows. Raises ConfigError for others."""
    words, known = text.split(","), get_args(kind)
    if not set(words) <= set(known):
        raise ConfigError(f"{option}: got {text!r}, want {', '.join(known)}, with commas")
    return words


APPS = {
    "bench": group("Measure what training costs on this machine.", "dbtrain bench pack --sizes 1,4,16", {
        "pack": Verb(pack_verb, """\
dbtrain bench pack --config tiny --sizes 1,4,16 --turns 5
dbtrain bench pack --config sd15_lora --random-weights --sizes 1,8,32"""),
        "ops": Verb(ops_verb, "dbtrain bench ops --json"),
        "step": Verb(step_verb, """\
dbtrain bench step --capture off,graph --attention sdpa,flash,xformers --sizes 1,8
dbtrain bench step --config sd15_lora --random-weights --capture off,compile,graph,compiled_graph"""),
        "model": Verb(model_verb, """\
dbtrain bench model sd15 --sizes 1,8
dbtrain bench model flux1 sdxl --card H200,4090 --recompute"""),
    })
}  # fmt: skip
