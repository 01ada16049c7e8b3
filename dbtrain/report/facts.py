"""One subject in the report: the facts of its page, and its row of the table.

Texts in here are the user's own and unchanged. Templates and script escape them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbtrain.errors import ConfigError
from dbtrain.evaluate.scores import SCORES, title
from dbtrain.report.reading import CONFIG, EVALUATION, number, numbers, read_log, read_object, read_text, settings, text
from dbtrain.results.record import RECORD, stage_seconds
from dbtrain.subjects.prompts import fill

SHOWN = tuple(score for score, metric in SCORES.items() if metric.column)
"""Scores that have a column in the table; the others are on the subjects' own pages."""
TAIL = 12
"""Number of the log's last lines on a page."""


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
        """The state in the ledger; without a ledger `finished` if there is a record, else `unfinished`."""
        return text(self.ledger.get("state"), 40) or ("finished" if self.record else "unfinished")

    @property
    def class_noun(self) -> str:
        """The class noun, empty if it is not known yet."""
        return text(self.record.get("class") or self.ledger.get("class"), 200)

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by what they were spent on; see `record.stage_seconds`."""
        return numbers(stage_seconds(self.record)) or numbers(self.ledger.get("stages_s"))

    @property
    def seconds(self) -> float | None:
        """Wall seconds of all attempts in the ledger, else the sum of the stages. None if neither is known."""
        counted = number(self.ledger.get("seconds"))
        return counted if counted is not None else sum(self.stages.values()) if self.stages else None

    @property
    def device_seconds(self) -> float | None:
        """Seconds times processes: GPU seconds, or CPU seconds if a CPU trained the subject. None if not known."""
        counted, seconds = number(self.ledger.get("gpu_seconds")), self.seconds
        if counted:
            return counted
        return None if seconds is None else seconds * (number(self.record.get("world_size")) or 1)

    @property
    def rate(self) -> float | None:
        """Steps a second while training; None if not known."""
        steps, seconds = number(self.record.get("steps")), self.stages.get("train")
        if steps and seconds:
            return steps / seconds
        return number(self.log[-1].get("steps_per_s")) if self.log else None

    @property
    def loss(self) -> float | None:
        """The last loss; None if not known."""
        if self.record:
            return number(self.record.get("loss"))
        return number(self.log[-1].get("loss")) if self.log else None

    @property
    def attempts(self) -> int | None:
        """The number of attempts; None without a ledger."""
        attempts = number(self.ledger.get("attempts"))
        return None if attempts is None else int(attempts)

    @property
    def finished(self) -> str:
        """ISO time of its end; empty if it has not ended."""
        return text(self.record.get("finished") or self.ledger.get("finished"), 40)

    @property
    def warnings(self) -> list[dict[str, str]]:
        """The evaluation's warnings: kind and text."""
        warnings = self.evaluation.get("warnings")
        return [
            {"kind": text(warning.get("kind"), 80), "text": text(warning.get("text"))}
            for warning in (warnings if isinstance(warnings, list) else [])[:20]
            if isinstance(warning, Mapping)
        ]

    @property
    def scores(self) -> list[dict[str, Any]]:
        """Each known score: name, meaning, value and interval, also of the base model and of the photos themselves."""
        return score_table(self.evaluation)

    @property
    def prompts(self) -> list[str]:
        """The prompts of the samples as the model was given them."""
        templates = self.settings.get("sample.prompts", [])
        words = {"identifier": text(self.record.get("identifier")) or None, "class_noun": self.class_noun or "subject"}
        return [_filled(template, words) for template in (templates if isinstance(templates, list) else [])]


def _filled(template: str, words: Mapping[str, Any]) -> str:
    try:
        return fill(template, **words)
    except ConfigError:
        return template


def score_table(evaluation: Any) -> list[dict[str, Any]]:
    """The rows of a score table from {"scores", "base", "real"}, in SCORES' order. Unknown scores are left out.

    more: whether a larger value is better. The table is empty if `evaluation` is no mapping.
    """
    rows = []
    for key, metric in SCORES.items() if isinstance(evaluation, Mapping) else ():
        own, base, real = (_interval(evaluation.get(part), key) for part in ("scores", "base", "real"))
        if own["value"] is not None:
            about = {"key": key, "name": title(key), "meaning": metric.meaning, "more": metric.better == "higher"}
            rows.append({**about, **own, "base": base, "real": real})
    return rows


def _interval(scores: Any, key: str) -> dict[str, float | None]:
    cell = scores.get(key) if isinstance(scores, Mapping) else None
    cell = cell if isinstance(cell, Mapping) else {"value": cell}
    return {part: number(cell.get(part)) for part in ("value", "low", "high")}


def read_facts(folder: Path, subject: str, ledger: Mapping[str, Any]) -> Facts:
    """The facts of a subject from its folder, which need not exist, and its row of the ledger, {} without a ledger."""
    notes: list[str] = []
    record, evaluation = (read_object(folder / name, notes) for name in (RECORD, EVALUATION))
    log = read_log(folder, notes)
    return Facts(subject, record, dict(ledger), evaluation, log, settings(read_text(folder / CONFIG, notes)), notes)


def differences(own: Mapping[str, Any], common: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(setting, the run's value, this subject's value) of each difference, sorted; none if a recipe is unknown."""
    keys = sorted(own.keys() | common.keys()) if own and common else []
    values = [(key, common.get(key, ""), own.get(key, "")) for key in keys if own.get(key) != common.get(key)]
    return [(key, text(joined(run), 300), text(joined(subject), 300)) for key, run, subject in values]


def joined(value: str | Sequence[str]) -> str:
    """A setting's value as one text; a list's values are separated by commas."""
    return value if isinstance(value, str) else ", ".join(value)


def row(facts: Facts, pictures: Mapping[str, Any]) -> dict[str, Any]:
    """The subject's row for the table, the gallery and every sum. It holds only plain JSON values."""
    scores = {score["key"]: score["value"] for score in facts.scores}
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
        "warnings": "; ".join(dict.fromkeys(warning["kind"] or warning["text"] for warning in facts.warnings))[:200],
        "reason": text(facts.ledger.get("reason"), 300),
        "cause": text(facts.ledger.get("cause"), 80),
        "finished": facts.finished,
        "photo": pictures.get("photo"),
        "sample": pictures.get("sample"),
        "stages": facts.stages,
    }
