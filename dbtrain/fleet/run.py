"""A run from its command line to its end: lease, ledger, shards, cluster, driver."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dbtrain.errors import ConfigError, DataError, FleetError
from dbtrain.fleet.inbox import take_requests
from dbtrain.fleet.ledger import NAME, WHERE, Lease, Ledger, find_ledger
from dbtrain.machine import cores
from dbtrain.settings.config import RunConfig
from dbtrain.storage.atomic import LOCK, held, write_file
from dbtrain.tiny import EMBEDDED


@dataclass(frozen=True)
class Options:
    """How a run is driven; nothing here decides a result, so none of it is part of a recipe. after: what is done with
    finished subjects, by its names in `afterwards.AFTER`. evaluation: fields of `evaluate.protocol.Protocol`."""

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
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    ledger: Path | None = None
    skip_bad: bool = False
    quiet: bool = False

    @property
    def asked(self) -> dict[str, str]:
        """What is done with finished subjects, with the settings that tell it from the same with others."""
        return {name: json.dumps(self.evaluation, sort_keys=True) if name == "evaluate" else "" for name in self.after}


def run_batch(
    manifest: Path, config: RunConfig, out: Path, options: Options, opened: Callable[[], object] = lambda: None
) -> dict[str, int]:
    """Number of subjects by state after the run; `opened` is called once it is let in. Raises StopRequested (75) after
    a stop request, and FleetError when no worker can work; the same call goes on from there."""
    if not manifest.is_file():
        raise DataError(f"{manifest}: there is no such manifest; give a CSV, JSONL, YAML or Parquet file")
    judging = {**options.evaluation}
    judging |= {key: absolute_name(judging[key]) for key in ("identity", "clip") if key in judging}
    config, options = anchored(config), replace(options, evaluation=judging)
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


def anchored(config: RunConfig) -> RunConfig:
    """The settings with relative paths made absolute: workers on a cluster run in a folder of Ray's choice."""
    changed = {section: {key: path(getattr(getattr(config, section), key)) for key, path in keys.items()}
               for section, keys in PATHS.items()}  # fmt: skip
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=keys) for section, keys in changed.items()}
    )


def absolute(path: str | None) -> str | None:
    """A path, absolute; an address, or None, as it is."""
    return path if path is None or "://" in path else str(Path(path).absolute())


def absolute_name(name: str | None) -> str | None:
    """A name as `absolute` if it is a path of something here; else it may be a hub id, or `embedded`, which stay."""
    return name if name is None or name == EMBEDDED or not Path(name).exists() else absolute(name)


PATHS: dict[str, dict[str, Callable[[str | None], str | None]]] = {
    "model": {"path": absolute_name, "single_file_layout": absolute_name},
    "data": {"shards": absolute},
    "prior": {"store": absolute},
    "identifier": {"registry": absolute},
    "engine": {"deepspeed": absolute},
}
"""Settings that name places, by section and key."""


def check_after(config: RunConfig, options: Options) -> None:
    """Nothing; ConfigError for what cannot be done with any finished subject."""
    sample, findings = config.sample, []
    if "generate" in options.after and not (sample.prompts and sample.images):
        findings.append("--generate: there is nothing to draw; set sample.prompts and sample.images")
    if "evaluate" in options.after:
        from dbtrain.evaluate.judge import load_judge
        from dbtrain.evaluate.protocol import PROTOCOLS, Protocol

        protocol = Protocol(**options.evaluation)
        if protocol.protocol not in PROTOCOLS:
            findings.append(f"--protocol: got {protocol.protocol!r}, want {' or '.join(PROTOCOLS)}")
        if protocol.protocol == "quick" and not sample.prompts:
            findings.append("--evaluate: the quick protocol has no prompts of its own; set sample.prompts")
        if not findings:
            load_judge(protocol.identity, protocol.clip, distance=protocol.distance)
    if findings:
        raise ConfigError(findings)


def ledger_folder(out: Path, asked: Path | None) -> Path:
    """The folder of a run's ledger: the one that the run has, or for a new run the one that is asked for (None is the
    output folder). ConfigError where these differ, FleetError where a run's ledger is not there."""
    known = find_ledger(out)
    begun = (out / WHERE).exists() or (out / NAME).exists()
    folder = asked.resolve() if asked is not None else known
    if begun and folder.resolve() != known.resolve():
        raise ConfigError(
            f"--ledger {asked}: the ledger of {out} is in {known}; give that folder or leave --ledger out. "
            f"To move a ledger, stop the run, move its files and name the new folder in {out / WHERE}"
        )
    if begun and not (folder / NAME).exists():
        raise FleetError(
            f"{folder}: the ledger of {out} is not there, so what became of its subjects is not known; go on where it "
            f"is (another machine's local disk?), put it back, or remove {out / WHERE} to begin a new ledger"
        )
    return folder


def _run(
    manifest: Path, config: RunConfig, out: Path, options: Options, folder: Path, opened: Callable[[], object]
) -> dict[str, int]:
    ledger = Ledger(folder, create=True)
    try:
        if folder.resolve() != out.resolve() and not (out / WHERE).exists():
            if ledger.run() is not None:
                raise ConfigError(f"--ledger {folder}: holds another run's ledger; give each run a folder of its own")
            write_file(out / WHERE, str(folder).encode())
        with ledger.commit():
            ledger.take_over()
        # What was asked of a driver in its last moments.
        take_requests(ledger, folder)
        from dbtrain.fleet.prepare import enter_run, tell

        index = enter_run(ledger, manifest, config, out, quiet if options.quiet else tell, options.skip_bad)
        opened()
        if options.address is None:
            # Ray reads this when it is imported: a node of its own then listens on the loopback interface only.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        from dbtrain.fleet.cluster import connected
        from dbtrain.fleet.driver import Driver

        driver = Driver(ledger, index, config, out, options)
        if not driver.books.view.empty:
            with connected(options.address, local_cpus(options)):
                driver.drive()
        if "evaluate" in options.after:
            sum_up(ledger, out)
        return ledger.counts()
    finally:
        ledger.close()


def sum_up(ledger: Ledger, out: Path) -> None:
    """Nothing; afterwards OUT/evaluation.json is the table over the subjects that were scored, if any was."""
    from dbtrain.evaluate.summary import write_summary

    found = ledger.afterwards()
    outcomes = {row["id"]: found.get(row["position"], {}).get("evaluate") for row in ledger.rows("id, position")}
    if "done" in outcomes.values():
        write_summary(out, {name: outcome for name, outcome in outcomes.items() if outcome not in (None, "done")})


def quiet(line: str) -> None:
    """Says nothing."""


def local_cpus(options: Options) -> int:
    """CPUs of an embedded Ray: for the workers asked for, or those that this process may use."""
    wanted = options.workers or max(1, int(cores() / options.cpus) // options.gang)
    return max(1, round(wanted * options.gang * options.cpus))
