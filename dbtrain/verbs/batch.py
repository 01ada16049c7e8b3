"""The verbs of the fleet: `dbtrain batch run|status|retry|cancel|verify|forget|export`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from dbtrain.errors import NAMED, ConfigError, DataError, DbtrainError, EngineError
from dbtrain.verbs.options import (
    Clip,
    Distance,
    Identity,
    Json,
    Manifest,
    Overrides,
    Protocol,
    PublishTo,
    Quiet,
    Recipe,
    SkipBad,
    Verb,
    group,
    keep_origin,
    load_settled,
    print_json,
    stop_at_once,
    with_address,
)

Out = Annotated[Path, typer.Argument(help="Output folder of the run.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID...]", help="Subjects; none means all.")]


def run_verb(
    manifest: Manifest,
    out: Annotated[Path, typer.Option(help="Output folder; running again with the same one goes on.")],
    recipe: Recipe,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers; by default one a GPU, else one a CPU.")] = None,
    gang: Annotated[int, typer.Option(min=1, help="GPUs (or CPU processes) that train one subject with ZeRO.")] = 1,
    address: Annotated[str | None, typer.Option(help="Ray cluster, such as `auto`; else one is made here.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="Folder on a local disk for the ledger, if not --out.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Draw each finished subject's prompts.")] = False,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Score each finished subject.")] = False,
    protocol: Protocol = "quick",
    identity: Identity = "embedded",
    clip: Clip = "embedded",
    distance: Distance = "auto",
    tries: Annotated[int, typer.Option(min=1, help="Failures of its own that quarantine a subject.")] = 3,
    losses: Annotated[int, typer.Option(min=1, help="Attempts a subject may lose to killed workers.")] = 100,
    hang: Annotated[float, typer.Option(min=0.5, help="Seconds without a step after which a worker is hung.")] = 300,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish a step and checkpoint when stopped.")] = 60,
    cpus: Annotated[float, typer.Option(min=0.1, help="CPUs of each worker.")] = 1,
    unit: Annotated[int, typer.Option(min=1, help="Most packs that are given to a worker at once.")] = 64,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be done, and what it will cost.")] = False,
    measured: Annotated[Path | None, typer.Option(help="With --plan: a run whose measured times to use.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on for ever, and take what joins MANIFEST.")] = False,
    publish_to: PublishTo = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train every subject of a manifest: plan, shards, priors, training, publishing. The same command again goes on.

    MANIFEST may be a folder of manifests. With --watch, rows that join it later are taken as they come, until a signal.
    """
    overrides = with_address(overrides, publish_to)
    config = load_settled(recipe, overrides)
    if gang > 1 and config.engine.kind == "packed":
        raise ConfigError("--gang: packed training runs on one GPU; use --gang 1, or engine.kind=zero")
    if gang > 1:
        from dbtrain.engines.engine import plan_batches

        plan_batches(config.train.batch, config.train.micro_batch, gang)
    if not evaluate and (protocol, identity, clip, distance) != ("quick", "embedded", "embedded", "auto"):
        raise ConfigError("--protocol, --identity, --clip, --distance: say how to evaluate; give --evaluate too")
    if plan:
        from dbtrain.fleet.estimate import describe, plan_run

        planned = plan_run(manifest, config, out, measured, skip_bad, gang)
        print_json(planned) if as_json else typer.echo(describe(planned))
        return
    from dbtrain.fleet.options import Options
    from dbtrain.fleet.run import run_batch
    from dbtrain.fleet.status import line, summarize_run

    after = tuple(name for name, wanted in (("generate", generate), ("evaluate", evaluate)) if wanted)
    judging = {"protocol": protocol, "identity": identity, "clip": clip, "distance": distance} if evaluate else {}
    options = Options(workers, gang, cpus=cpus, hang_s=hang, grace_s=grace, tries=tries, losses=losses, unit=unit,
                      address=address, after=after, evaluation=judging, ledger=ledger, skip_bad=skip_bad,
                      quiet=quiet, watch=watch)  # fmt: skip
    stop_at_once()
    opened = partial(keep_origin, out, "batch run", manifest, recipe, overrides, skip_bad)
    not_uploaded = run_batch(manifest, config, out, options, opened)
    summary = summarize_run(out)
    print_json(summary) if as_json else typer.echo(line(summary))
    raise_failures(summary, after, not_uploaded)


def raise_failures(
    summary: dict[str, Any], after: Sequence[str], not_uploaded: Mapping[str, DbtrainError] = MappingProxyType({})
) -> None:
    """Raise EngineError if subjects are quarantined, else DataError if finished ones could not be drawn, scored or
    uploaded."""
    quarantined = [f"{row['subject']}: {row['cause']}: {row['reason']}" for row in summary["quarantined"]]
    more = summary["subjects"]["quarantined"] - len(quarantined)
    quarantined += [f"and {more} more; see `dbtrain batch export`"] if more > 0 else []
    failed = {name: summary["after"][name]["failed"] for name in after if name in summary["after"]}
    lines = [f"--{name}: failed for {number} subjects; see `dbtrain batch export`, column after"
             for name, number in failed.items() if number]  # fmt: skip
    lines += [f"{name}: {error}" for name, error in list(not_uploaded.items())[:NAMED]]
    lines += [f"and {len(not_uploaded) - NAMED} more are not uploaded"] if len(not_uploaded) > NAMED else []
    if quarantined or lines:
        raise (EngineError if quarantined else DataError)("\n".join([*quarantined, *lines]))


def status_verb(out: Out, as_json: Json = False) -> None:
    """Show where a run stands; works beside the driver, after it, and on a run that was killed."""
    from dbtrain.fleet.status import summarize_run, table

    summary = summarize_run(out)
    if as_json:
        print_json(summary)
        return
    from rich.console import Console

    Console().print(table(summary))
    typer.echo("a driver is at work" if summary["driven"] else "no driver is at work; `dbtrain batch run` goes on")


def retry_verb(out: Out, ids: Ids = None) -> None:
    """Let quarantined or cancelled subjects wait again; a driver at work takes them up, else the next one does."""
    _request(out, "retry", ids)


def cancel_verb(out: Out, ids: Ids = None) -> None:
    """Take waiting subjects out of a run; those being trained are finished."""
    _request(out, "cancel", ids)


def _request(out: Path, verb: str, ids: list[str] | None) -> None:
    from dbtrain.fleet.inbox import request
    from dbtrain.fleet.lease import find_ledger

    changed = request(find_ledger(out), verb, ids or None)
    typer.echo("the driver at work, or the next one, will do it" if changed is None else f"{changed} subjects changed")


def verify_verb(out: Out, as_json: Json = False) -> None:
    """Read every finished result, and let subjects wait again whose files are not what their record says.

    \b
    Example:
      dbtrain batch verify runs/all
    """
    from dbtrain.fleet.verifying import verify_run

    finished, rotten = verify_run(out)
    if as_json:
        print_json({"finished": finished, "rotten": rotten})
    if rotten:
        lines = [f"{name}: {problem}" for name, problem in rotten.items()]
        what = f"{len(rotten)} of {finished} results have rotted; their subjects wait again for `dbtrain batch run`"
        raise DataError("\n".join([*lines, what]))
    if not as_json:
        typer.echo(f"{finished} results are what they were when they were finished")


def forget_verb(
    out: Annotated[Path, typer.Option(help="Output folder of the run.")],
    ids: Annotated[list[str] | None, typer.Argument(help="Subjects; none ends what was interrupted.")] = None,
    as_json: Json = False,
) -> None:
    """Remove a person from a run: photos, captions, adapter, images, checkpoints, logs, pages, row.

    It cannot be undone. The other subjects keep every bit. Killed at any moment, it is run again and ends its work.
    """
    from dbtrain.fleet.forgetting import COPIES, forget, told

    done = forget(out, ids or ())
    if done is None:
        typer.echo("the driver at work, or the next one, will do it; `dbtrain batch status` shows `forgotten` then")
        return
    if (out / "report").is_dir():
        from dbtrain.report.building import rebuild

        rebuild(out)
    print_json(asdict(done)) if as_json else typer.echo("\n".join(told(out, done)))
    if done.refused:
        raise DataError(f"{len(done.refused)} uploaded copies are still there; run the same command again, or delete "
                        f"them yourself and then {out / COPIES}")  # fmt: skip


def export_verb(
    out: Out,
    to: Annotated[Path, typer.Option(help="File to write: .parquet or .csv.")],
) -> None:
    """Write one row a subject: state, attempts, reason, times, GPU-seconds, digests."""
    from dbtrain.fleet.export import write_rows

    typer.echo(f"{to}: {write_rows(out, to)} rows")


VERBS = {"forget": Verb(forget_verb, "dbtrain forget rex --out runs/rex")}
APPS = {
    "batch": group("Train thousands of subjects over many workers, each finished exactly once.",
                   "dbtrain batch run photos.csv --config sdxl_lora --out runs/all", {
        "run": Verb(run_verb, """\
dbtrain batch run photos.csv --config sdxl_lora --out runs/all --plan --measured runs/pilot
dbtrain batch run photos.csv --config sdxl_lora --out runs/all
dbtrain batch run photos.csv --config sdxl_lora --out runs/all --evaluate --protocol dreambooth \\
  --identity facebook/dino-vits16 --clip openai/clip-vit-base-patch32
dbtrain batch run photos.csv --config sdxl_full_zero3 --gang 4 --address auto --out /shared/all --ledger /ledger"""),
        "status": Verb(status_verb, "dbtrain batch status runs/all --json"),
        "retry": Verb(retry_verb, "dbtrain batch retry runs/all dog7"),
        "cancel": Verb(cancel_verb, "dbtrain batch cancel runs/all"),
        "verify": Verb(verify_verb, "dbtrain batch verify runs/all"),
        "forget": Verb(forget_verb, "dbtrain batch forget dog7 --out runs/all"),
        "export": Verb(export_verb, "dbtrain batch export runs/all --to runs/all.parquet"),
    })
}  # fmt: skip
