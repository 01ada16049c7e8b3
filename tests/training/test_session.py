"""What the subjects of a run share: the priors at hand and the stores."""

import pytest
import torch

from dbtrain.data.index import Index
from dbtrain.engines.world import World
from dbtrain.errors import ConfigError
from dbtrain.models.adapters import layers
from dbtrain.training.clock import Clock
from dbtrain.training.session import Base, ClassPriors, PriorCache, Watch, Work
from dbtrain.training.trainables import make_trainable
from dbtrain.values import Subject
from tests.kit.main_job import small_config

ALONE = World(0, 1, "cpu")


def test_the_classes_that_were_used_last_are_kept():
    cache, priors = PriorCache(2), {name: ClassPriors([name]) for name in "abc"}
    for name in ("a", "b", "a", "c"):
        cache.keep(name, priors[name])
    assert cache.kept == {"a": priors["a"], "c": priors["c"]}


def test_stores_are_the_runs_own_or_shared(tmp_path):
    own, shared = small_config(), small_config("prior.store=elsewhere", "data.shards=s3://bucket/shards")
    rex = Subject("rex", "dog", ())
    work = Work.under(tmp_path, own, [rex], {"rex": "srx"}, Index((), ()))
    assert (work.shards, work.priors) == (tmp_path / "shards", tmp_path / "priors")
    assert work.folder(rex) == tmp_path / "subjects" / "rex"
    work = Work.under(tmp_path, shared, [rex], {"rex": "srx"}, Index((), ()))
    assert (str(work.shards), str(work.priors)) == ("s3://bucket/shards", "elsewhere")


def test_a_watch_says_what_it_is_given_unless_it_is_quiet(capsys):
    Watch(quiet=True).say("nothing")
    Watch().say("a line")
    assert capsys.readouterr().err == "a line\n"
    beats = []
    watch = Watch(beat=beats.append, clock=Clock())
    apart = watch.timed_apart()
    with apart.clock.stage("save"):
        pass
    assert beats == ["save"] and not watch.clock.seconds and apart.stop is watch.stop


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_base_is_restored_in_place(method):
    """Whoever holds the models sees them as they were before the subject, to the bit."""
    base = Base.load(small_config(f"train.method={method}"), ALONE)
    models = base.models
    before = {name: tensor.clone() for name, tensor in models.denoiser.state_dict().items()}
    groups = make_trainable(base.family, models, base.settings, "rex")
    assert bool(layers(models.denoiser)) == (method == "lora")
    with torch.no_grad():
        for param in (param for group in groups for param in group.params.values()):
            param.add_(1)
    base.restore()
    assert base.models is models and not layers(models.denoiser)
    after = models.denoiser.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_layers_that_diffusers_keeps_in_fp32_stay_there(model_folders):
    model = ["model.family=krea2", f"model.path={model_folders['krea2']}", "data.resolution=64", "prior.sampler=auto"]
    bf16 = ["model.dtype=bf16", "train.precision=bf16", "objective.timesteps=logit_normal"]
    denoiser = Base.load(small_config(*model, *bf16), ALONE).models.denoiser
    kept = {name: "norm" in name for name, _ in denoiser.named_parameters()}
    assert any(kept.values()) and not all(kept.values())
    for name, parameter in denoiser.named_parameters():
        assert parameter.dtype == (torch.float32 if kept[name] else torch.bfloat16), name


def test_attention_that_is_proved_by_a_call_is_proved_before_any_work(model_folders):
    """A denoiser sees a small picture when it is loaded. DeepFloyd's pools its text by a softmax of its own."""
    small = ("objective.timesteps=logit_normal", "prior.sampler=auto", "model.attention=flash")

    def words(name):
        return small_config(*small, f"model.family={name}", f"model.path={model_folders[name]}")

    base = Base.load(words("lumina2"), ALONE)
    assert base.models.attention.row()["ran"] == ["flash"]
    late = Base.load(words("lumina2"), ALONE, late=True)
    late.ready([("a dog",)])
    assert late.models.attention.row()["ran"] == ["flash"]
    with pytest.raises(ConfigError, match="model.attention: asked for flash, but flash and math runs"):
        Base.load(words("if_stage1"), ALONE)
