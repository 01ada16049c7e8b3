"""What a worker may do with a finished subject on its loaded base: draw its prompts, score it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from dbtrain.evaluate.judge import load_judge
from dbtrain.evaluate.protocol import Settings, evaluate_finished
from dbtrain.fleet.trainer import Task
from dbtrain.models.sampling import draw_samples
from dbtrain.results.finished import finished_config, finished_pipeline, refuse_nothing
from dbtrain.results.record import finished_record
from dbtrain.results.sheets import publish_sheet
from dbtrain.subjects.prompts import fill
from dbtrain.training.session import Base, Watch


def generate(base: Base, watch: Watch, folder: Path, task: Task) -> None:
    """Draw the recipe's prompts into the subject's `generated.png`."""
    record, config = finished_record(folder), finished_config(folder, ())
    refuse_nothing(folder, {"generated": config.sample.prompts}, config)
    names = {"identifier": record["identifier"], "class_noun": record["class"]}
    texts = [fill(prompt, **names) for prompt in config.sample.prompts]
    with finished_pipeline(folder, base.family, base.models, config) as pipeline:
        rows = draw_samples(pipeline, texts, config.sample, config.data.resolution, config.train.precision)
    publish_sheet(folder, rows, texts, "generated")


def evaluate(base: Base, watch: Watch, folder: Path, task: Task) -> None:
    """Score the subject, as the run was told to, into its `evaluation.json`."""
    settings = Settings(**task.evaluation)
    judge = warm_judge(settings.identity, settings.clip, base.world.device, settings.distance)
    evaluate_finished(folder, base.models, base.family, settings, judge)


warm_judge = cache(load_judge)
"""The encoders, loaded once a worker."""


AFTER: dict[str, Callable[[Base, Watch, Path, Task], None]] = {"generate": generate, "evaluate": evaluate}
"""What can be asked for, by its name."""
