"""A run's entry, before any worker starts: its photos go into shards, its subjects get identifiers and a ledger."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from dbtrain.data.index import INDEX_NAME, Index
from dbtrain.data.stream import SKIPPED
from dbtrain.fleet.ledger import Ledger
from dbtrain.fleet.living import (
    photos_digest,
    refuse_changed_rows,
    settings_relation,
    stored_photos,
    take_in,
    with_identifiers,
)
from dbtrain.results.identity import Relation
from dbtrain.settings.config import RunConfig
from dbtrain.settings.marks import deciding
from dbtrain.subjects.finding import refuse
from dbtrain.subjects.forgotten import not_forgotten
from dbtrain.subjects.manifest import manifest_digest, scan_manifest
from dbtrain.subjects.registry import REGISTRY, recorded_identifiers
from dbtrain.subjects.sharding import shard_subjects


def tell(line: str) -> None:
    """Print a line for the person who watches."""
    print(line, file=sys.stderr, flush=True)


def enter_run(
    ledger: Ledger,
    manifest: Path,
    config: RunConfig,
    out: Path,
    say: Callable[[str], None] = tell,
    skip_bad: bool = False,
) -> Index:
    """The index of the run's shards, once the ledger holds the run. skip_bad: enter subjects with findings as skipped,
    with the findings as reasons.

    A run that is there already must have the same settings, or the same for more steps (ConfigError), and its rows must
    say the same (DataError). What has joined is taken in. If neither the manifest nor a photo has changed, no photo is
    read.
    """
    config_digest, new_digest = settings_digest(config), manifest_digest(manifest)
    run, folder = ledger.run(), out / "shards"
    how = Relation.SAME if run is None else settings_relation(run, config, config_digest, out)
    scanned = scan_manifest(manifest, config.data.shards is None)
    subjects, findings = not_forgotten(*scanned, out)
    if run is not None and how is Relation.SAME and run["manifest_digest"] == new_digest:
        # Photos that are in the shards may have been removed since.
        same = bool(scanned[1]) or run["photos_digest"] in (None, photos_digest(subjects))
        if same and (folder / INDEX_NAME).exists():
            return Index.load(folder)
    if not skip_bad:
        refuse(findings)
    if run is not None:
        refuse_changed_rows(ledger, subjects, out)
    from dbtrain.models.load import load_tokenizer  # loads torch, which a restart does without

    tokenizer = load_tokenizer(config.model.single_file_layout or config.model.path)
    registry = Path(config.identifier.registry or out / REGISTRY)
    if run is not None and (folder / INDEX_NAME).exists():
        with ledger.commit():  # of a run by an earlier dbtrain, before its shards grow
            ledger.note_photos(stored_photos(Index.load(folder)), anew=False)
    index = shard_subjects(subjects, findings, folder, config, say, skip_bad, tokenizer, registry)
    stored = set(index.subjects)
    sound = [subject for subject in subjects if subject.id in stored]
    names = recorded_identifiers(registry, tokenizer, sound, config.identifier.tokens, config.seed)
    about: dict[str, str | None] = {
        "config": config.model_dump_json(),
        "config_digest": config_digest,
        "manifest": str(manifest.resolve()),
        "manifest_digest": new_digest,
        "photos_digest": photos_digest(sound),
    }
    named, skipped = with_identifiers(sound, names), left_out(folder / SKIPPED)
    if run is None:
        with ledger.commit():
            ledger.create_run(about, named, skipped)
            ledger.note_photos(stored_photos(index))
    else:
        take_in(ledger, about, named, skipped, stored_photos(index), how is Relation.LONGER, say)
    return index


def left_out(path: Path) -> dict[str, str]:
    """Reasons of the subjects that sharding left out, by id; of a row without one, by its place in the manifest."""
    findings = json.loads(path.read_text()) if path.exists() else {}
    return {name: "; ".join(reasons) for name, reasons in findings.items()}


def settings_digest(config: RunConfig) -> str:
    """One sha256 of the settings that decide results."""
    return hashlib.sha256(json.dumps(deciding(config), sort_keys=True).encode()).hexdigest()
