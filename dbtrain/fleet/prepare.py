"""Before any worker starts: the run enters the ledger, its photos go into shards, its subjects get their names."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from dbtrain.data.index import INDEX_NAME, Index
from dbtrain.data.stream import SKIPPED
from dbtrain.errors import ConfigError, DataError
from dbtrain.fleet.ledger import Ledger
from dbtrain.models.load import load_tokenizer
from dbtrain.settings.config import RunConfig
from dbtrain.settings.marks import deciding
from dbtrain.storage.atomic import file_digest
from dbtrain.subjects.finding import refuse
from dbtrain.subjects.manifest import scan_manifest
from dbtrain.subjects.registry import REGISTRY, recorded_identifiers
from dbtrain.subjects.sharding import shard_subjects
from dbtrain.values import Subject


def tell(line: str) -> None:
    """One line for the person who watches."""
    print(line, file=sys.stderr, flush=True)


def enter_run(
    ledger: Ledger,
    manifest: Path,
    config: RunConfig,
    out: Path,
    say: Callable[[str], None] = tell,
    skip_bad: bool = False,
) -> Index:
    """The index of the run's shards; afterwards the ledger holds the run. skip_bad: enter subjects with findings as
    skipped, with the findings as reasons.

    A run that is there already must have the same settings and manifest, else ConfigError or DataError; then neither
    the manifest nor a photo is read again.
    """
    config_digest, manifest_digest = settings_digest(config), file_digest(manifest)
    run = ledger.run()
    if run is not None:
        if run["config_digest"] != config_digest:
            raise ConfigError(f"{out}: holds a run with other settings ({_difference(run, config)}); use another --out")
        if run["manifest_digest"] != manifest_digest:
            raise DataError(f"{out}: holds a run of another manifest than {manifest}; use another --out")
        if (out / "shards" / INDEX_NAME).exists():
            return Index.load(out / "shards")
    tokenizer = load_tokenizer(config.model.single_file_layout or config.model.path)
    subjects, findings = scan_manifest(manifest, config.data.shards is None)
    if not skip_bad:
        refuse(findings)
    registry = Path(config.identifier.registry or out / REGISTRY)
    index = shard_subjects(subjects, findings, out / "shards", config, say, skip_bad, tokenizer, registry)
    if run is None:
        stored = set(index.subjects)
        sound = [subject for subject in subjects if subject.id in stored]
        names = recorded_identifiers(registry, tokenizer, sound, config.identifier.tokens, config.seed)
        about = {
            "config": config.model_dump_json(),
            "config_digest": config_digest,
            "manifest": str(manifest.resolve()),
            "manifest_digest": manifest_digest,
        }
        specs = (spec_of(subject, names[subject.id]) for subject in sound)
        with ledger.commit():
            ledger.create_run(about, specs, left_out(out / "shards" / SKIPPED))
    return index


def left_out(path: Path) -> dict[str, str]:
    """Reasons of the subjects that sharding left out, by id; of a row without one, by its place in the manifest."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return {name: "; ".join(reasons) for name, reasons in found.items()}


def spec_of(subject: Subject, identifier: str) -> dict[str, Any]:
    """What training needs of a subject besides its photos."""
    own = {one.name: getattr(subject, one.name) for one in fields(subject) if one.name != "images"}
    return {**own, "identifier": identifier}


def settings_digest(config: RunConfig) -> str:
    """One sha256 of the settings that decide results."""
    return hashlib.sha256(json.dumps(deciding(config), sort_keys=True).encode()).hexdigest()


def _difference(run: dict[str, Any], config: RunConfig) -> str:
    old, new = deciding(RunConfig.model_validate_json(run["config"])), deciding(config)
    pairs = [(f"{part}.{key}", old[part][key], new[part][key]) for part in old if isinstance(old[part], dict)
             for key in old[part] if old[part][key] != new[part][key]]  # fmt: skip
    pairs += [
        (part, old[part], new[part]) for part in old if not isinstance(old[part], dict) and old[part] != new[part]
    ]
    return "; ".join(f"{key} was {before!r}, is {now!r}" for key, before, now in pairs[:3])
