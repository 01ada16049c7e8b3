"""What the launcher starts in test_launcher.py: the trainings of a plan, one after another in the same processes."""

import json
import sys
from pathlib import Path

from dbtrain.engines.world import start_world, stop_world
from dbtrain.settings.config import RunConfig
from dbtrain.train import train_manifest


def main(plan_file: str) -> None:
    """Trains every entry of a JSON list of {manifest, out, config}."""
    start_world()
    for entry in json.loads(Path(plan_file).read_text()):
        config = RunConfig.model_validate(entry["config"])
        _, failed = train_manifest(Path(entry["manifest"]), config, Path(entry["out"]), ["rex"], quiet=True)
        assert not failed, failed
    stop_world()


if __name__ == "__main__":
    main(sys.argv[-1])
