"""How a run is driven: paths that hold on every machine, and what is refused before any work."""

import pytest

from dbtrain.fleet.options import Options, anchored_options
from dbtrain.settings.marks import anchored
from tests.kit.fleet_run import batch, write_small
from tests.kit.main_job import small_config


def test_workers_elsewhere_get_the_paths_of_the_command(tmp_path, monkeypatch):
    """With `--address` a worker runs where its node's Ray was started, and would look for relative paths there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd15").mkdir()
    words = ("model.path=sd15", "prior.store=priors", "data.shards=shards", "identifier.registry=ids.jsonl")
    config = small_config(*words)
    there = anchored(config)
    assert there.model.path == str(tmp_path / "sd15") and there.prior.store == str(tmp_path / "priors")
    assert there.data.shards == str(tmp_path / "shards") and there.identifier.registry == str(tmp_path / "ids.jsonl")
    assert there.engine.deepspeed is None and there.model_copy(update=dict(config)) == config
    (tmp_path / "embedded").mkdir()
    words = ("model.path=embedded", "data.shards=s3://bucket/shards", "prior.store=/shared/priors")
    assert anchored(small_config(*words)) == small_config(*words)
    hub = small_config("model.path=stabilityai/stable-diffusion-xl-base-1.0")
    assert anchored(hub) == hub


def test_encoders_are_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    options = anchored_options(Options(evaluation={"identity": "mine", "clip": "embedded", "protocol": "quick"}))
    assert options.evaluation == {"identity": str(tmp_path / "mine"), "clip": "embedded", "protocol": "quick"}
    assert anchored_options(Options()) == Options()


def test_scores_of_other_settings_are_asked_for_anew():
    quick, paper = (
        Options(after=("generate", "evaluate"), evaluation={"protocol": name}) for name in ("quick", "dreambooth")
    )
    assert quick.asked["generate"] == paper.asked["generate"] and quick.asked["evaluate"] != paper.asked["evaluate"]


@pytest.mark.parametrize("asked, overrides, told", [
    (["--evaluate", "--protocol", "thorough"], [], "--protocol: got 'thorough', want dreambooth or quick"),
    (["--evaluate", "--identity", "no/where"], [], "no/where"),
    (["--evaluate"], ["sample.prompts=[]"], "the quick protocol has no prompts of its own"),
    (["--generate"], ["sample.images=0"], "--generate: there is nothing to draw"),
    (["--clip", "no/where"], [], "give --evaluate too"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_before_any_work(tmp_path, asked, overrides, told):
    words = write_small(tmp_path, "a:dog", "sample.images=1", *overrides)
    done = batch("run", *words, "--out", tmp_path / "out", *asked)
    assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()
