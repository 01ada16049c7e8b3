"""A run's numbers for Prometheus, through the metrics port that every Ray node has."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Gauge

TABLES = {
    "dbtrain_subjects": ("Subjects of the run by state.", "state", "subjects"),
    "dbtrain_attempts_lost": ("Attempts that ended without a result, by cause.", "cause", "retries"),
    "dbtrain_gpu_seconds": ("GPU seconds spent, by kind of work.", "kind", "gpu_seconds"),
    "dbtrain_workers": ("Workers by state.", "state", "workers"),
}
"""Gauges with a value for each label: what they say, the label's name, and their table in a summary of the run."""


class Gauges:
    """What a driver exports of itself."""

    def __init__(self) -> None:
        self.gauges = {name: Gauge(name, about, (label,)) for name, (about, label, _) in TABLES.items()}
        self.per_s = Gauge("dbtrain_subjects_per_second", "Subjects finished a second, lately.", ())
        self.states: set[str] = set()

    def show(self, summary: dict[str, Any]) -> None:
        """Export a summary of the run (`status.summarize`)."""
        shown = {**summary, "workers": self.workers(summary["workers"])}
        for name, (_, label, table) in TABLES.items():
            for key, value in shown[table].items():
                self.gauges[name].set(value, {label: key})
        self.per_s.set(summary["per_s"])

    def workers(self, rows: list[dict[str, Any]]) -> dict[str, int]:
        """Number of workers by state; a state that was seen once stays, with 0."""
        now = [row["state"] for row in rows]
        self.states |= set(now)
        return {state: now.count(state) for state in self.states}
