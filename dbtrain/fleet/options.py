"""How a run is driven: the options of `dbtrain batch run`, checked, with paths that hold on every machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dbtrain.errors import ConfigError
from dbtrain.machine import cores
from dbtrain.settings.config import RunConfig
from dbtrain.settings.marks import absolute_name


@dataclass(frozen=True)
class Options:
    """Nothing here decides a result, so none of it is part of a recipe. after: what is done with finished subjects, by
    its names in `work.AFTER`. evaluation: fields of `evaluate.protocol.Protocol`."""

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
    watch: bool = False

    @property
    def asked(self) -> dict[str, str]:
        """What is done with finished subjects, each with the settings that its result depends on."""
        return {name: json.dumps(self.evaluation, sort_keys=True) if name == "evaluate" else "" for name in self.after}

    @property
    def local_cpus(self) -> int:
        """CPUs of an embedded Ray: for the workers asked for, or those that this process may use."""
        wanted = self.workers or max(1, int(cores() / self.cpus) // self.gang)
        return max(1, round(wanted * self.gang * self.cpus))


def anchored_options(options: Options) -> Options:
    """The options with the encoders' relative paths made absolute."""
    asked = options.evaluation
    encoders = {key: absolute_name(asked[key]) for key in ("identity", "clip") if key in asked}
    return replace(options, evaluation={**asked, **encoders})


def check_after(config: RunConfig, options: Options) -> None:
    """Raise ConfigError for what cannot be done with any finished subject."""
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
