"""Training begun at one number of ranks and ZeRO stage and ended at others, by real processes, without conversion.

The samples are the same, so losses agree; tolerances are derived in test_launcher.py.
"""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest

from tests.e2e.every_stage import train_all, train_plan
from tests.e2e.test_launcher import LOSS_REL, STEADY, WEIGHT_ABS, log, weights
from tests.kit.forked import ranks
from tests.kit.main_job import small_config, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 4
METHODS = ("lora", "full")
OUTWARD = [("lora", 0), ("full", 1), *product(METHODS, (2, 3))]
"""Begun at one rank without ZeRO, ended at two ranks at this stage. Stages 0 and 1 keep weights whole in any method."""
BACK = list(product(METHODS, (2, 3)))
"""Begun at two ranks at this stage, ended at one rank without ZeRO."""
WIDER = [("lora", 1), ("full", 3)]
"""Begun at one rank without ZeRO, ended at four ranks at this stage."""


def entry(folder: Path, out: str, method: str, stage: int, *more: str) -> dict:
    words = [*STEADY, f"train.steps={STEPS}", f"train.method={method}", f"engine.zero.stage={stage}", *more]
    config = small_config(*words, "checkpoint.every_steps=1", "checkpoint.keep=9")
    return {
        "manifest": str(folder / "photos.csv"),
        "out": str(folder / out),
        "config": config.model_dump(mode="json"),
    }


def start_at(folder: Path, source: str, target: str, step: int) -> None:
    """A folder that holds nothing of an earlier run but its checkpoint after a step."""
    name = f"subjects/rex/checkpoints/step-{step:08d}"
    shutil.copytree(folder / source / name, folder / target / name)


def train_at(folder: Path, count: int, entries: list[dict]) -> None:
    """Train a plan at so many ranks; one rank is this process."""
    if count == 1:
        train_all(entries)
        return
    plan = folder / "plan.json"
    plan.write_text(json.dumps(entries))
    ranks(count, train_plan, plan)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("elsewhere")
    write_job(made, subjects="rex:dog")
    train_at(made, 1, [entry(made, f"straight-{method}", method, 0) for method in METHODS])
    for method, stage in OUTWARD:
        start_at(made, f"straight-{method}", f"outward-{method}-{stage}", 2)
    train_at(made, 2, [entry(made, f"outward-{method}-{stage}", method, stage) for method, stage in OUTWARD])
    for method, stage in WIDER:
        start_at(made, f"straight-{method}", f"wider-{method}-{stage}", 2)
    train_at(made, 4, [entry(made, f"wider-{method}-{stage}", method, stage) for method, stage in WIDER])
    for method, stage in BACK:
        start_at(made, f"outward-{method}-{stage}", f"back-{method}-{stage}", 3)
    named = "checkpoint.resume=step-00000003"
    train_at(made, 1, [entry(made, f"back-{method}-{stage}", method, 0, named) for method, stage in BACK])
    return made


@pytest.mark.parametrize(
    "way, method, stage, steps",
    [("outward", *one, [3, 4]) for one in OUTWARD]
    + [("wider", *one, [3, 4]) for one in WIDER]
    + [("back", *one, [4]) for one in BACK],
)
def test_it_ends_where_the_straight_run_ends(folder, way, method, stage, steps):
    got, want = (folder / name / "subjects" / "rex" for name in (f"{way}-{method}-{stage}", f"straight-{method}"))
    assert [row["step"] for row in log(got)] == steps
    for name in ("loss", "loss_instance", "loss_prior", "grad_norm"):
        rows = {row["step"]: row[name] for row in log(want)}
        assert [row[name] for row in log(got)] == pytest.approx([rows[step] for step in steps], rel=LOSS_REL), name
    got_weights, want_weights = weights(got), weights(want)
    assert got_weights.keys() == want_weights.keys()
    assert max(float((got_weights[name] - want_weights[name]).abs().max()) for name in want_weights) <= WEIGHT_ABS


@pytest.mark.parametrize("method", METHODS)
def test_the_last_steps_moved_the_weights(folder, method):
    """Else ending anywhere would pass: from the checkpoint to the end is far more than the tolerance."""
    from dbtrain.results.checkpoint import read_checkpoint

    root = folder / f"straight-{method}" / "subjects" / "rex" / "checkpoints"
    before, after = (read_checkpoint(root / f"step-{step:08d}").state["master"] for step in (2, 3))
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 20 * WEIGHT_ABS
