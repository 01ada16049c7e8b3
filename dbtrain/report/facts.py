"""One subject as the report tells it: the facts of its page, and the row that stands for it in the table.

Texts in here are the user's own and stay as they are; templates and script escape them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbtrain.errors import ConfigError
from dbtrain.evaluate.scores import SCORES, title
from dbtrain.report.reading import (
    CONFIG,
    EVALUATION,
    LOG,
    RECORD,
    number,
    numbers,
    read_log,
    read_object,
    read_text,
    settings,
    text,
)
from dbtrain.subjects.prompts import fill

SHOWN = tuple(score for score in SCORES if score not in ("clip_t_plain", "prompt_gap"))
"""Scores that have a column in the table; the others are on the subjects' own pages."""
TAIL = 12
"""Lines of the log on a page."""


@dataclass
class Facts:
    """What is known of one subject."""

    id: str
    record: dict[str, Any]
    ledger: dict[str, Any]
    evaluation: dict[str, Any]
    log: list[dict[str, Any]]
    settings: Mapping[str, str | list[str]]
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """The ledger's word; without a ledger `finished` where there is a record, and `unfinished` otherwise."""
        return text(self.ledger.get("state"), 40) or ("finished" if self.record else "unfinished")

    @property
    def class_noun(self) -> str:
        """The class noun, empty if it is not known yet."""
        return text(self.record.get("class") or self.ledger.get("class"), 200)

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage."""
        return numbers(self.record.get("stages_s")) or numbers(self.ledger.get("stages_s"))

    @property
    def seconds(self) -> float | None:
        """Wall seconds: the ledger's, which counts every attempt, or the sum of the stages."""
        counted = number(self.ledger.get("seconds"))
        return counted if counted is not None else sum(self.stages.values()) if self.stages else None

    @property
    def device_seconds(self) -> float | None:
        """Seconds times processes: what the subject cost in GPU seconds, or CPU seconds where that trained it."""
        counted, seconds = number(self.ledger.get("gpu_seconds")), self.seconds
        if counted:
            return counted
        return None if seconds is None else seconds * (number(self.record.get("world_size")) or 1)

    @property
    def rate(self) -> float | None:
        """Steps a second while training."""
        steps, seconds = number(self.record.get("steps")), self.stages.get("train")
        if steps and seconds:
            return steps / seconds
        return number(self.log[-1].get("steps_per_s")) if self.log else None

    @property
    def loss(self) -> float | None:
        """The last loss."""
        return (
            number(self.record.get("loss")) if self.record else number(self.log[-1].get("loss")) if self.log else None
        )

    @property
    def attempts(self) -> int | None:
        """How often it was tried; None without a ledger."""
        found = number(self.ledger.get("attempts"))
        return None if found is None else int(found)

    @property
    def finished(self) -> str:
        """ISO time of its end, empty if it has none."""
        return text(self.record.get("finished") or self.ledger.get("finished"), 40)

    @property
    def warnings(self) -> list[dict[str, str]]:
        """The evaluation's warnings: kind and text."""
        found = self.evaluation.get("warnings")
        return [
            {"kind": text(each.get("kind"), 80), "text": text(each.get("text"))}
            for each in (found if isinstance(found, list) else [])[:20]
            if isinstance(each, Mapping)
        ]

    @property
    def scores(self) -> list[dict[str, Any]]:
        """Each known score: name, meaning, value, interval, and the same of the base and of the photos themselves."""
        return score_table(self.evaluation)

    @property
    def prompts(self) -> list[str]:
        """The prompts of the samples, as they were given to the model."""
        templates = self.settings.get("sample.prompts", [])
        words = {"identifier": text(self.record.get("identifier")) or None, "class_noun": self.class_noun or "subject"}
        return [_filled(each, words) for each in (templates if isinstance(templates, list) else [])]


def _filled(template: str, words: Mapping[str, Any]) -> str:
    try:
        return fill(template, **words)
    except ConfigError:
        return template


def score_table(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a score table from {"scores", "base", "real"}, in SCORES' order; unknown scores are left out."""
    rows = []
    for key in SCORES:
        own, base, real = (_interval(evaluation.get(part), key) for part in ("scores", "base", "real"))
        if own["value"] is not None:
            rows.append({**about_score(key), **own, "base": base, "real": real})
    return rows


def about_score(key: str) -> dict[str, Any]:
    """{"key", "name", "meaning", "more"} of a score; more: whether more is better."""
    metric = SCORES[key]
    return {"key": key, "name": title(key), "meaning": metric.meaning, "more": metric.better == "higher"}


def _interval(scores: Any, key: str) -> dict[str, float | None]:
    found = scores.get(key) if isinstance(scores, Mapping) else None
    if not isinstance(found, Mapping):
        found = {"value": found}
    return {part: number(found.get(part)) for part in ("value", "low", "high")}


def read_facts(folder: Path, subject: str, ledger: Mapping[str, Any]) -> Facts:
    """The facts of a subject from its folder, which need not exist, and its row in the ledger ({} without one)."""
    notes: list[str] = []
    record, evaluation = (read_object(folder / name, notes) for name in (RECORD, EVALUATION))
    log = read_log(folder / LOG, notes)
    return Facts(subject, record, dict(ledger), evaluation, log, settings(read_text(folder / CONFIG, notes)), notes)


def differences(own: Mapping[str, Any], common: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(setting, the run's value, this subject's value) wherever they differ, sorted; nothing if either is unknown."""
    keys = sorted(own.keys() | common.keys()) if own and common else []
    return [(key, _shown(common.get(key)), _shown(own.get(key))) for key in keys if own.get(key) != common.get(key)]


def _shown(value: str | Sequence[str] | None) -> str:
    return text(value if value is None or isinstance(value, str) else ", ".join(value), 300)


def row(facts: Facts, pictures: Mapping[str, Any]) -> dict[str, Any]:
    """The subject in the table, in the gallery and in every sum; only plain JSON values."""
    scores = {each["key"]: each["value"] for each in facts.scores}
    return {
        "id": facts.id,
        "class": facts.class_noun,
        "state": facts.state,
        "attempts": facts.attempts,
        "seconds": facts.seconds,
        "device_s": facts.device_seconds,
        "rate": facts.rate,
        "loss": facts.loss,
        **{key: scores.get(key) for key in SHOWN},
        "warnings": "; ".join(each["kind"] or each["text"] for each in facts.warnings)[:200],
        "reason": text(facts.ledger.get("reason"), 300),
        "cause": text(facts.ledger.get("cause"), 80),
        "finished": facts.finished,
        "photo": pictures.get("photo"),
        "sample": pictures.get("sample"),
        "stages": facts.stages,
    }
