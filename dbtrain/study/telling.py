"""What is told of a study: the values of its page, its JSON, and the chosen recipe as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError
from dbtrain.settings.recipes import render
from dbtrain.storage.atomic import write_file
from dbtrain.study.findings import Effect, Goal, Line, Row, cheapest, effects, front, table, whole_cost
from dbtrain.study.running import Study, prior_seconds
from dbtrain.study.variants import Design

SCHEMA = 1
RESULT = "study.json"
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Told:
    """What a study came to. chosen: the recipe that is cheapest and good enough, if any. costs: what runs would cost, a
    sentence each. failed: reasons by variant and subject. photos: of each subject. dropped: variants that were not
    trained to the end, with the reason; they are not in `table`."""

    out: Path
    design: Design
    goal: Goal
    rows: Sequence[Row]
    table: Sequence[Line]
    effects: Sequence[Effect]
    chosen: Line | None
    costs: Sequence[str]
    failed: Mapping[str, str]
    photos: Mapping[str, Sequence[Path]]
    dropped: Mapping[str, str]

    @property
    def best(self) -> list[Line]:
        """The variants of the front."""
        return front(self.table, self.goal)


def tell(study: Study, subjects: int, classes: int) -> Told:
    """What a study comes to, after its work is done. subjects, classes: of the runs whose cost is told."""
    rows = study.run()
    variants = [variant for variant in study.design.variants() if variant.name not in study.dropped]
    lines = table(rows, variants)
    if not lines:
        reasons = "".join(f"\n{name}: {reason}" for name, reason in study.failed.items())
        raise DataError(f"{study.out}: no subject was finished by every variant, so none can be compared{reasons}")
    chosen = cheapest(lines, study.goal)
    costs = []
    if chosen is not None:
        costs = [whole_cost(chosen, prior_seconds(study.out, chosen.variant.config), subjects, classes)]
    found = effects(rows, variants, study.design.vary)
    photos = {subject.id: subject.images for subject in study.subjects}
    told = (study.goal, rows, lines, found, chosen, costs, study.failed, photos, study.dropped)
    return Told(study.out, study.design, *told)


def write_found(told: Told) -> None:
    """Write OUT/study.json, and OUT/recipe.yaml where a recipe was chosen; an older choice goes."""
    write_file(told.out / RESULT, json.dumps(as_found(told), indent=1, ensure_ascii=False).encode())
    if told.chosen is None:
        (told.out / RECIPE_FILE).unlink(missing_ok=True)
        return
    variant = told.chosen.variant
    head = f"# {told.design.recipe} with {variant.title}: chosen by dbtrain study.\n"
    write_file(told.out / RECIPE_FILE, (head + render(variant.config)).encode())


def as_found(told: Told) -> dict[str, Any]:
    """The study as JSON."""
    return {
        "schema": SCHEMA,
        "recipe": told.design.recipe,
        "overrides": list(told.design.overrides),
        "vary": {key: list(words) for key, words in told.design.vary},
        "goal": {"identity": told.goal.identity, "pres": told.goal.pres},
        "variants": [
            {
                "name": line.variant.name,
                "changes": dict(line.variant.changes),
                "front": line in told.best,
                "chosen": line is told.chosen,
                **{name: interval.row("subjects") for name, interval in line.means.items()},
            }
            for line in told.table
        ],
        "effects": [effect.text for effect in told.effects],
        "costs": list(told.costs),
        "rows": [
            {"variant": row.variant, "subject": row.subject, "cost_s": row.cost_s, "steps": row.steps, **row.scores}
            for row in told.rows
        ],
        "dropped": dict(told.dropped),
        "failed": dict(told.failed),
    }
