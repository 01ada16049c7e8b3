"""A run's numbers for Prometheus, through the metrics port that every Ray node has."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Gauge

NAMES = {
    "dbtrain_subjects": ("Subjects of the run by state.", ("state",)),
    "dbtrain_attempts_lost": ("Attempts that ended without a result, by cause.", ("cause",)),
    "dbtrain_gpu_seconds": ("GPU seconds spent, by kind of work.", ("kind",)),
    "dbtrain_subjects_per_second": ("Subjects finished a second, lately.", ()),
    "dbtrain_workers": ("Workers by state.", ("state",)),
}


class Gauges:
    """What a driver exports of itself."""

    def __init__(self) -> None:
        self.gauges = {name: Gauge(name, about, keys) for name, (about, keys) in NAMES.items()}
        self.states: set[str] = set()

    def show(self, summary: dict[str, Any]) -> None:
        """Export a summary of the run (`status.summarize`)."""
        tables = (
            ("dbtrain_subjects", "state", summary["subjects"]),
            ("dbtrain_attempts_lost", "cause", summary["retries"]),
            ("dbtrain_gpu_seconds", "kind", summary["gpu_seconds"]),
            ("dbtrain_workers", "state", self.workers(summary["workers"])),
        )
        for name, key, table in tables:
            for label, value in table.items():
                self.gauges[name].set(value, {key: label})
        self.gauges["dbtrain_subjects_per_second"].set(summary["per_s"])

    def workers(self, rows: list[dict[str, Any]]) -> dict[str, int]:
        """Number of workers by state; a state that was seen once stays, with 0."""
        now = [row["state"] for row in rows]
        self.states |= set(now)
        return {state: now.count(state) for state in self.states}
