"""A run from its command line to its end: lease, ledger, shards, cluster, driver."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from dbtrain.errors import ConfigError, DataError, DbtrainError, FleetError
from dbtrain.fleet.inbox import take_requests
from dbtrain.fleet.lease import WHERE, Lease, ledger_folder
from dbtrain.fleet.ledger import Ledger
from dbtrain.fleet.options import Options, anchored_options, check_after
from dbtrain.fleet.warm_parent import hosting
from dbtrain.results.uploading import refuse_address
from dbtrain.settings.config import RunConfig
from dbtrain.settings.marks import anchored
from dbtrain.storage.atomic import LOCK, held, write_file
from dbtrain.training.telemetry import refuse_trackers


def run_batch(
    manifest: Path, config: RunConfig, out: Path, options: Options, opened: Callable[[], object] = lambda: None
) -> dict[str, DbtrainError]:
    """The errors of finished subjects that are not at `publish.to`, by id. opened: called once the run has passed its
    checks.

    Raises StopRequested (75) after a stop request, and FleetError when no worker can work; the same call goes on.
    """
    if not manifest.exists():
        raise DataError(f"{manifest}: there is no such manifest; give a CSV, JSONL, YAML or Parquet file, or a folder")
    if options.watch and config.data.shards is not None:
        raise ConfigError("--watch: data.shards names shards that are ready, and nothing joins them; take one of both")
    config, options = anchored(config), anchored_options(options)
    refuse_trackers(config.track)
    refuse_address(config.publish)
    check_after(config, options)
    out.mkdir(parents=True, exist_ok=True)
    folder = ledger_folder(out, options.ledger)
    lease = Lease(folder)
    try:
        with held(out / LOCK) as ours:
            if not ours:
                raise FleetError(f"{out}: `dbtrain train` is working there; wait for it, or use another --out")
            ledger_folder(out, options.ledger)  # another driver may have come and gone meanwhile
            return _run(manifest, config, out, options, folder, opened)
    finally:
        lease.release()


def _run(
    manifest: Path, config: RunConfig, out: Path, options: Options, folder: Path, opened: Callable[[], object]
) -> dict[str, DbtrainError]:
    ledger = Ledger(folder, create=True)
    try:
        if folder.resolve() != out.resolve() and not (out / WHERE).exists():
            if ledger.run() is not None:
                raise ConfigError(f"--ledger {folder}: holds another run's ledger; give each run a folder of its own")
            write_file(out / WHERE, str(folder).encode())
        with ledger.commit():
            ledger.take_over()
        # Apply requests that the previous driver did not read.
        take_requests(ledger, folder)
        work = options.watch or ledger.run() is None or ledger.counts()["waiting"] > 0
        warm = work and not options.address
        with hosting(out / "logs" / "warm-parent.log", options.cpus) if warm else nullcontext("") as host:
            return _drive(manifest, config, out, options, ledger, host, opened)
    finally:
        ledger.close()


def _drive(
    manifest: Path, config: RunConfig, out: Path, options: Options, ledger: Ledger, host: str,
    opened: Callable[[], object],
) -> dict[str, DbtrainError]:  # fmt: skip
    from dbtrain.fleet.arrivals import Arrivals, wait_for_first
    from dbtrain.fleet.entry import enter_run, tell
    from dbtrain.fleet.forgetting import end_forgetting, told

    done = end_forgetting(out, ledger)
    if done.removed or done.refused:
        tell("\n".join(told(out, done)))

    say: Callable[[str], None] = (lambda line: None) if options.quiet else tell
    if options.watch:
        wait_for_first(manifest, config, say)
    index = enter_run(ledger, manifest, config, out, say, options.skip_bad or options.watch)
    opened()
    if options.address is None:
        # Ray reads this when it is imported: a node of its own then listens on the loopback interface only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    from dbtrain.fleet.cluster import connected
    from dbtrain.fleet.driver import Driver

    driver = Driver(ledger, index, config, out, options, host)
    driver.uploads.add(out / "subjects" / row["id"] for row in ledger.rows() if row["state"] == "finished")
    if options.watch:
        driver.arrivals = Arrivals(manifest, config, out, driver.screen.say)
    if options.watch or not driver.books.view.empty:
        with connected(options.address, options.local_cpus):
            driver.drive()
    if "evaluate" in options.after:
        sum_up(ledger, out)
    return driver.uploads.finish(lambda: driver.stopping is not None)


def sum_up(ledger: Ledger, out: Path) -> None:
    """Write OUT/evaluation.json, the table over the subjects that were scored, if any was."""
    from dbtrain.evaluate.summary import write_summary

    outcomes = {name: done["evaluate"] for name, done in ledger.afterwards().items() if "evaluate" in done}
    if "done" in outcomes.values():
        write_summary(out, {name: outcome for name, outcome in outcomes.items() if outcome != "done"})
