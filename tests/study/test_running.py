"""A study in one process: each row is what training it alone gives, and nothing is done twice."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dbtrain.errors import ConfigError, DataError
from dbtrain.evaluate.protocol import Protocol
from dbtrain.results.publish import LORA_FILE
from dbtrain.settings.recipes import load
from dbtrain.study import running
from dbtrain.study.findings import Row
from dbtrain.study.running import Study, even_costs, filled, folder_of, prior_seconds
from dbtrain.study.variants import Design
from dbtrain.train import train_manifest
from dbtrain.training.session import Watch
from tests.kit.main_job import sd_folder, write_job

SINGLE = 2e-5
"""float32, products summed in another order; relative to how far the weights moved."""
QUICK = Protocol(class_images=1)
VARY = (("train.lr", ("1e-3", "4e-3")), ("train.batch", ("2",)))


def design(folder, *more):
    words = (f"model.path={sd_folder()}", "train.clip_norm=0.02", "engine.packed.size=2", *more)
    return Design(str(folder / "small.yaml"), words, VARY)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study of three variants of two subjects, and what it came to."""
    folder = tmp_path_factory.mktemp("study")
    write_job(folder)
    study = Study(design(folder), folder / "photos.csv", folder / "out", QUICK, Watch(True))
    return folder, study, study.run()


def weights(folder):
    return load_file(folder / LORA_FILE)


def test_every_row_is_trained_and_scored(done):
    folder, study, rows = done
    assert study.failed == {} and [(row.variant, row.subject) for row in rows] == [
        (name, subject) for name in ("recipe", "lr-4e-3", "batch-2") for subject in ("rex", "tom")
    ]
    assert all({"dino", "pres", "clip_t_plain"} <= row.scores.keys() and row.cost_s > 0 for row in rows)
    assert prior_seconds(folder / "out", study.design.variants()[0].config) > 0
    # One folder of photos, class images and base pictures for all variants.
    assert sorted(path.name for path in (folder / "out" / "base").iterdir()) == ["cat", "dog"]
    assert not list((folder / "out" / "variants").glob("*/evaluation"))
    # Training drew none of the pictures that are scored.
    assert not list((folder / "out" / "variants").glob("*/subjects/*/samples*"))
    assert len(list((folder_of(folder / "out", "recipe", "rex") / "evaluation").glob("tuned-*.png"))) == 1


@pytest.mark.parametrize("name, words", [("lr-4e-3", ["train.lr=4e-3"]), ("batch-2", ["train.batch=2"])])
def test_a_row_is_what_training_it_alone_gives(done, name, words):
    folder, study, _ = done
    own = study.design
    for kind, exact in (("packed", True), ("zero", False)):
        config = load(own.recipe, [*own.overrides, *words, f"prior.store={folder / 'out' / 'priors'}"])
        alone = folder / f"{name}-{kind}"
        config = config.replaced("engine.kind", kind)
        _, failed = train_manifest(folder / "photos.csv", config, alone, ["tom"], quiet=True)
        assert not failed
        theirs = weights(alone / "subjects" / "tom")
        ours = weights(folder_of(folder / "out", name, "tom"))
        for key, value in theirs.items():
            assert torch.equal(ours[key], value) or not exact, key
            assert (ours[key] - value).norm() <= SINGLE * value.norm(), key


def test_step_counts_are_met_by_one_training_and_each_is_what_training_it_alone_gives(done, tmp_path):
    folder, study, _ = done
    varied = (("train.steps", ("2", "3")), ("lora.rank", ("1",)))
    one = replace(study, design=replace(study.design, vary=varied, grid=True), out=tmp_path / "out", protocol=QUICK)
    (tmp_path / "photos.csv").write_text(f"subject,class,images\ntom,cat,{folder / 'tom'}\n")
    one = replace(one, manifest=tmp_path / "photos.csv")
    longer = replace(one, design=replace(one.design, vary=(("train.steps", ("2", "3", "4")), varied[1]), grid=True))
    one.run()
    rows = {row.variant: row for row in longer.run()}
    assert longer.failed == {} and [(row.steps, row.begun_at) for row in rows.values()] == [(2, 0), (3, 2), (4, 3)]
    per_step = [row.cost_s / row.steps for row in rows.values()]
    assert per_step == pytest.approx([per_step[0]] * 3)
    for name, row in rows.items():
        words = [*study.design.overrides, "lora.rank=1", f"train.steps={row.steps}", "engine.kind=packed"]
        words.append("engine.packed.size=1")  # a study's pack has no row to spare
        config = load(study.design.recipe, [*words, f"prior.store={tmp_path / 'out' / 'priors'}"])
        _, failed = train_manifest(tmp_path / "photos.csv", config, tmp_path / name, ["tom"], quiet=True)
        theirs = weights(tmp_path / name / "subjects" / "tom")
        ours = weights(folder_of(tmp_path / "out", name, "tom"))
        assert not failed and all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_again_is_nothing_and_a_lost_row_alone_is_made_anew(done):
    folder, study, rows = done
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "out" / "variants").rglob("*") if path.is_file()}
    assert replace(study).run() == rows
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    lost = folder_of(folder / "out", "lr-4e-3", "rex")
    before = weights(lost)
    for name in ("record.json", "evaluation.json"):
        (lost / name).unlink()
    again = replace(study).run()
    assert [(row.variant, row.subject, row.scores) for row in again] == [
        (row.variant, row.subject, row.scores) for row in rows
    ]
    changed = {path for path, stamp in stamps.items() if path.exists() and path.stat().st_mtime_ns != stamp}
    assert changed and all(path.is_relative_to(lost) for path in changed)
    assert all(torch.equal(value, before[key]) for key, value in weights(lost).items())


def test_halving_goes_on_with_all_that_is_not_clearly_worse(done, monkeypatch):
    _, study, rows = done
    monkeypatch.setattr(running, "FEWEST", 1)
    halved = replace(study, halve=True)
    told = [[(row.variant, row.subject, row.scores) for row in made] for made in (halved.run(), rows)]
    assert told[0] == told[1] and all(reason.endswith("on 2 subjects") for reason in halved.dropped.values())


def test_what_a_fleet_is_given_is_the_training_that_the_study_names(done):
    """In the fleet's place is the trainer that it starts: it finds every row finished, so one digest names both."""
    folder, study, rows = done
    given = []

    def fleet(manifest, config, out):
        records, failed = train_manifest(manifest, config, out, None, quiet=True)
        given.append((out.name, len(records), failed))

    stamps = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("record.json")}
    made = replace(study, fleet=fleet).run()
    assert [(row.variant, row.subject) for row in made] == [(row.variant, row.subject) for row in rows]
    assert given == [(name, 2, {}) for name in ("recipe", "lr-4e-3", "batch-2")]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    with pytest.raises(ConfigError, match="--workers, --halve"):
        replace(study, fleet=fleet, halve=True).run()


def test_scores_of_another_protocol_are_not_taken(done):
    folder, study, _ = done
    other = replace(study, protocol=Protocol(class_images=2))
    other.run()
    found = json.loads((folder_of(folder / "out", "recipe", "rex") / "evaluation.json").read_text())
    assert found["protocol"]["class_images"] == 2


def test_a_subjects_own_value_of_what_is_varied_is_refused(done, tmp_path):
    folder, study, _ = done
    (folder / "own.csv").write_text("subject,class,images,lr\nrex,dog,rex,1e-4\n")
    with pytest.raises(DataError, match="the study varies"):
        replace(study, manifest=folder / "own.csv", out=tmp_path).run()


def test_a_pack_has_no_row_to_spare():
    assert [filled(16, rows) for rows in (1, 8, 16, 17, 24, 64)] == [1, 8, 16, 9, 12, 16]
    assert filled("auto", 3) == "auto"


def test_the_cost_of_a_group_is_shared_out_by_steps():
    told = (("a", 5.0, 10), ("b", 1.0, 10), ("c", 2.0, 20))
    rows = [Row(variant, "rex", "dog", seconds, {}, steps) for variant, seconds, steps in told]
    assert [row.cost_s for row in even_costs(rows)] == [2, 2, 4]
