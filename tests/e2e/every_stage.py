"""What the launcher starts in test_launcher.py: the trainings of a plan, one after another in the same processes."""

import json
import sys
from pathlib import Path

from dbtrain.engines.world import start_world, stop_world
from dbtrain.settings.config import RunConfig
from dbtrain.train import train_manifest


def train_all(entries: list[dict]) -> None:
    """Train every entry {manifest, out, config} of a plan."""
    for entry in entries:
        config = RunConfig.model_validate(entry["config"])
        _, failed = train_manifest(Path(entry["manifest"]), config, Path(entry["out"]), ["rex"], quiet=True)
        assert not failed, failed


def train_plan(plan: Path) -> None:
    """Train a plan's entries as a rank of the world that the environment names."""
    start_world()
    train_all(json.loads(plan.read_text()))
    stop_world()


if __name__ == "__main__":
    train_plan(Path(sys.argv[-1]))
