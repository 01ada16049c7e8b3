"""The door for programs: what it opens is what the commands do, from any thread, with progress and stops."""

import inspect
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import dbtrain
from dbtrain import api
from dbtrain.results import uploading
from dbtrain.results.record import finished_record
from tests.kit.main_job import environment, sd_folder, write_job

ROOT = Path(__file__).parents[1]
QUICK = ["sample.images=0", "prior.weight=0"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with photos, manifest and recipe, and the settings beside the recipe."""
    folder = tmp_path_factory.mktemp("api")
    write_job(folder)
    return folder, str(folder / "small.yaml"), [f"model.path={sd_folder()}", "train.steps=2", *QUICK]


@pytest.fixture(scope="module")
def rex(job):
    folder, recipe, settings = job
    return dbtrain.train_subject(folder / "rex", "dog", folder / "one", recipe, settings, subject="rex")


def test_the_import_loads_nothing_heavy():
    code = "import dbtrain, sys; dir(dbtrain); print([m for m in sys.modules if m.partition('.')[0] in "
    code += "('torch', 'numpy', 'diffusers', 'transformers', 'pydantic', 'typer', 'PIL')])"
    seen = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


def test_every_name_is_there_described_and_typed():
    stub = (ROOT / "dbtrain" / "__init__.pyi").read_text()
    assert set(dbtrain.API) == set(api.__all__) == set(re.findall(r"import (\w+) as \1", stub))
    page = (ROOT / "docs" / "api.md").read_text()
    for name in dbtrain.API:
        assert inspect.getdoc(getattr(dbtrain, name)) and f"`{name}" in page and name in dir(dbtrain)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = dbtrain.trian


def test_a_subject_is_trained_once_and_its_pipeline_draws_it(job, rex):
    folder, recipe, settings = job
    assert rex.record["subject"] == "rex" and rex.record == finished_record(rex.folder)
    again = dbtrain.train_subject(folder / "rex", "dog", folder / "one", recipe, settings, subject="rex")
    assert again.record["finished"] == rex.record["finished"]
    draw = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    images = {}
    for weight in (1.0, 0.0):
        import torch

        drawn = rex.pipeline(weight)(rex.caption, generator=torch.Generator().manual_seed(0), **draw)
        images[weight] = drawn.images[0]
    assert images[1.0].shape == (32, 32, 3) and abs(images[1.0] - images[0.0]).max() > 0


def test_a_kept_pipeline_is_the_one_that_generate_draws_with(rex):
    import torch

    from dbtrain.families import FAMILIES
    from dbtrain.models.load import load_models
    from dbtrain.results.finished import finished_config, finished_pipeline

    config = finished_config(rex.folder, ())
    draw = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    models = load_models(FAMILIES["sd"], config.model)
    with finished_pipeline(rex.folder, FAMILIES["sd"], models, config) as pipeline:
        want = pipeline(rex.caption, generator=torch.Generator().manual_seed(0), **draw).images[0]
    got = dbtrain.load(str(rex.folder)).pipeline()(rex.caption, generator=torch.Generator().manual_seed(0), **draw)
    assert abs(got.images[0] - want).max() == 0


def test_rows_are_a_manifest_that_the_command_line_takes_too(job, rex):
    folder = job[0]
    row = json.loads((folder / "one" / "photos.jsonl").read_text())
    assert row == {"subject": "rex", "class": "dog", "images": str(folder / "rex")}
    from dbtrain.subjects.manifest import read_manifest

    assert [subject.id for subject in read_manifest(folder / "one" / "photos.jsonl")] == ["rex"]


def test_a_pack_gives_progress_and_what_is_not_uploaded_is_named(job, tmp_path, monkeypatch):
    folder, recipe, settings = job
    monkeypatch.setattr(uploading, "PAUSES_S", ())
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "tom").write_text("in the way")
    rows = [{"subject": name, "class": "dog", "images": folder / name} for name in ("rex", "tom")]
    seen, far = [], str(tmp_path / "far")
    given = {"pack": 2, "publish_to": far, "logged": lambda *line: seen.append(line)}
    trained = dbtrain.train_manifest(rows, tmp_path / "out", recipe, settings, **given)
    assert [result.record["subject"] for result in trained.results] == ["rex", "tom"]
    assert {result.record["pack_size"] for result in trained.results} == {2}
    assert list(trained.failed) == ["tom"] and "not yet at" in str(trained.failed["tom"])
    assert sorted(line[:3] for line in seen) == [(name, step, 2) for name in ("rex", "tom") for step in (1, 2)]
    assert all({"loss", "lr", "images_per_s"} <= set(values) for *_, values in seen)
    assert dbtrain.load(tmp_path / "far" / "rex").record["subject"] == "rex"
    (tmp_path / "far" / "tom").unlink()
    assert dbtrain.train_manifest(rows, tmp_path / "out", recipe, settings, **given).failed == {}


def test_a_stop_from_the_callback_in_a_thread_and_going_on(job, tmp_path):
    """In a thread, as in a web app, with an event loop in it, as in a notebook."""
    folder, recipe, settings = job
    stop, told, seen = dbtrain.Stop(), [], []
    words = [*settings, "train.steps=6", "checkpoint.every_steps=2"]

    def logged(subject, step, steps, values):
        seen.append((step, steps))
        if step == 3:
            stop.ask()
            try:
                dbtrain.train_subject(folder / "tom", "cat", tmp_path / "other", recipe, settings)
            except dbtrain.EngineError as error:
                told.append(str(error))

    def work():
        import asyncio

        async def train():
            dbtrain.train_subject(folder / "tom", "cat", tmp_path / "out", recipe, words, logged=logged, stop=stop)

        try:
            asyncio.run(train())
        except dbtrain.StopRequested as stopped:
            told.append(str(stopped))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert [line.partition(";")[0] for line in told] == [
        "another training of this process is under way",
        "subject: stopped on request after step 4",
    ]
    result = dbtrain.train_subject(
        folder / "tom", "cat", tmp_path / "out", recipe, words, logged=lambda *line: seen.append(line[1:3])
    )
    assert result.record["steps"] == 6 and seen == [(step, 6) for step in range(1, 7)]


def test_an_error_of_a_callback_ends_the_training_and_the_next_one_works(job, tmp_path):
    folder, recipe, settings = job

    def logged(*_):
        raise ZeroDivisionError("of the program")

    call = (folder / "tom", "cat", tmp_path / "out", recipe, settings)
    with pytest.raises(ZeroDivisionError):
        dbtrain.train_subject(*call, logged=logged)
    assert dbtrain.train_subject(*call).record["class"] == "cat"


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"config": "none"}, "ConfigError", "none"),
        ({"settings": ["train.stpes=3"]}, "ConfigError", "train.steps"),
        ({"images": "no/such/folder"}, "DataError", "no/such/folder"),
        ({"images": []}, "DataError", "images"),
        ({"publish_to": "https://host/x"}, "ConfigError", "publish.to"),
        ({"row": {"steps": "many"}}, "DataError", "steps"),
        ({"pack": 0}, "ConfigError", "engine.packed.size"),
    ],
)
def test_mistakes_are_errors_with_a_text_before_any_work(job, tmp_path, change, error, text):
    folder, recipe, settings = job
    given = {"images": folder / "rex", "class_noun": "dog", "config": recipe, "settings": settings, **change}
    with pytest.raises(getattr(dbtrain, error), match=re.escape(text)):
        dbtrain.train_subject(out=tmp_path / "out", **given)
    assert not (tmp_path / "out" / "subjects").exists()


def test_what_is_no_result_is_not_loaded(tmp_path):
    with pytest.raises(dbtrain.DataError, match="holds no finished subject"):
        dbtrain.load(tmp_path)
    with pytest.raises(dbtrain.ConfigError, match="has no identiy"):
        dbtrain.score(tmp_path, identiy="x")


def test_the_example_of_the_readme_runs(job, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = [block for block in blocks if "import dbtrain" in block]
    assert code in (ROOT / "docs" / "api.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "rex").symlink_to(job[0] / "rex")
    code = code.replace('config="sd15_lora"', f"config={job[1]!r}, settings={job[2]!r}")
    exec(code.replace("(prompt=rex.caption)", "(prompt=rex.caption, num_inference_steps=1, height=32, width=32)"), {})
    assert (tmp_path / "rex.png").stat().st_size > 0
