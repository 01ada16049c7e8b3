"""The pictures of many finished subjects, drawn together: their adapters are the rows of one stack on the base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dbtrain.errors import DbtrainError
from dbtrain.evaluate.protocol import Planned, Protocol, draw_chunk, planned, sampling, sound
from dbtrain.models.family import Family, Models
from dbtrain.results.finished import has_adapter, stacked_pipeline

STACKED = 16
"""Most adapters on the base at once."""


def draw_together(folders: Sequence[Path], models: Models, family: Family, protocol: Protocol) -> None:
    """Draw what `evaluate_finished` would draw for each of these subjects, so that it finds its pictures there.

    A batch holds up to `protocol.batch` pictures, of several subjects. A single subject, a whole model, one of several
    stages, and a subject whose files are damaged are left to `evaluate_finished`.
    """
    plans = {folder: _planned(folder, models, protocol) for folder in folders if has_adapter(folder)}
    work = {folder: plan for folder, plan in plans.items() if plan and not plan.config.stages}
    for way in dict.fromkeys(sampling(plan.config) for plan in work.values()):
        alike = [folder for folder, plan in work.items() if sampling(plan.config) == way]
        for start in range(0, len(alike), STACKED):
            with suppress(DbtrainError):  # of a damaged adapter, which is said of its own subject
                own = {folder: work[folder] for folder in alike[start : start + STACKED]}
                _draw(own, models, family, protocol.batch)


def _draw(work: dict[Path, Planned], models: Models, family: Family, batch: int) -> None:
    folders = [*work]
    missing = [
        (row, shot) for row, plan in enumerate(work.values()) for shot in plan.own if not sound(shot.file)
    ]
    if len({row for row, _ in missing}) < 2:
        return
    config = work[folders[0]].config
    with stacked_pipeline(folders, family, models) as pipeline:
        for start in range(0, len(missing), batch):
            chunk = missing[start : start + batch]
            # Nothing is drawn in vain to fill the last batch up: only a pack promises pictures equal in every bit.
            draw_chunk(pipeline, [shot for _, shot in chunk], config, len(chunk), [row for row, _ in chunk])


def _planned(folder: Path, models: Models, protocol: Protocol) -> Planned | None:
    try:
        return planned(folder, models, protocol)
    except DbtrainError:
        return None
