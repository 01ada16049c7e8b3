"""A run from its command line to its end: lease, ledger, shards, cluster, driver."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dbtrain.atomic import LOCK, held, write_file
from dbtrain.config import RunConfig
from dbtrain.errors import FleetError
from dbtrain.fleet.ledger import WHERE, Lease, Ledger, find_ledger


@dataclass(frozen=True)
class Options:
    """How a run is driven; nothing here decides a result, so none of it is part of a recipe."""

    workers: int | None = None
    gang: int = 1
    gpus: float = 1
    cpus: float = 1
    hang_s: float = 300
    grace_s: float = 60
    tries: int = 3
    losses: int = 100
    unit: int = 64
    address: str | None = None
    after: tuple[str, ...] = ()
    ledger: Path | None = None
    skip_bad: bool = False
    quiet: bool = False


def run_batch(
    manifest: Path, config: RunConfig, out: Path, options: Options, opened: Callable[[], object] = lambda: None
) -> dict[str, int]:
    """Number of subjects by state after the run; `opened` is called once it is let in. Raises StopRequested (75) after
    a stop request, and FleetError when no worker can work; the same call goes on from there."""
    out.mkdir(parents=True, exist_ok=True)
    if options.ledger is not None:
        write_file(out / WHERE, str(options.ledger.resolve()).encode())
    folder = find_ledger(out)
    lease = Lease(folder)
    try:
        with held(out / LOCK) as ours:
            if not ours:
                raise FleetError(f"{out}: `dbtrain train` is working there; wait for it, or use another --out")
            return _run(manifest, config, out, options, folder, opened)
    finally:
        lease.release()


def _run(
    manifest: Path, config: RunConfig, out: Path, options: Options, folder: Path, opened: Callable[[], object]
) -> dict[str, int]:
    ledger = Ledger(folder, create=True)
    try:
        with ledger.commit():
            ledger.take_over()
        from dbtrain.fleet.prepare import enter_run, tell

        index = enter_run(ledger, manifest, config, out, quiet if options.quiet else tell, options.skip_bad)
        opened()
        if options.address is None:
            # Ray reads this when it is imported: a node of its own then listens on the loopback interface only.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        from dbtrain.fleet.cluster import connected
        from dbtrain.fleet.driver import Driver

        driver = Driver(ledger, index, config, out, options)
        if not driver.view.empty:
            with connected(options.address, local_cpus(options)):
                driver.drive()
        return ledger.counts()
    finally:
        ledger.close()


def quiet(line: str) -> None:
    """Says nothing."""


def local_cpus(options: Options) -> int:
    """CPUs of an embedded Ray: for the workers asked for, or what the machine has."""
    cpus = os.cpu_count() or 1
    wanted = options.workers or max(1, int(cpus / options.cpus) // options.gang)
    return max(1, round(wanted * options.gang * options.cpus))
