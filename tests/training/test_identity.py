"""A subject's own settings, and the digest that names its training."""

from dbtrain.data.index import Index
from dbtrain.engines.world import World
from dbtrain.training.identity import subject_config, training_identity
from dbtrain.training.session import Base, PriorCache, Work
from dbtrain.values import Subject
from tests.kit.main_job import sample, small_config

REX = Subject("rex", "dog", ())


def test_a_subjects_own_settings_hold_for_it_alone():
    config = small_config()
    own = subject_config(config, Subject("rex", "dog", (), seed=5, steps=2, lr=2e-3, rank=3, prior_weight=0.5))
    assert (own.seed, own.train.steps, own.train.lr, own.lora.rank, own.prior.weight) == (5, 2, 2e-3, 3, 0.5)
    assert own.model_copy(update={name: getattr(config, name) for name in ("seed", "train", "lora", "prior")}) == config
    assert subject_config(config, Subject("tom", "cat", ())) == config


def digest(tmp_path, *words, subject=REX, identifier="srx", photos=(0, 1)):
    from types import SimpleNamespace

    config = small_config(*words)
    models = SimpleNamespace(digests={"unet/config.json": "a"}, source="here")
    base = Base(World(0, 1, "cpu"), None, models, config, PriorCache(1))
    work = Work.under(tmp_path, config, [subject], {subject.id: identifier}, Index((), ()))
    return training_identity(config, subject, base, work, [sample(number) for number in photos]).run


def test_all_that_decides_a_result_is_in_the_digest_and_nothing_else(tmp_path):
    """A run may go on elsewhere, at other intervals and on another engine, but not with another rate or photo."""
    plain = digest(tmp_path)
    for words in (["track.every_steps=7"], ["checkpoint.every_steps=2"], ["engine.zero.stage=2"], ["prior.batch=2"]):
        assert digest(tmp_path / "elsewhere", *words) == plain, words
    others = [
        digest(tmp_path, "train.lr=0.5"),
        digest(tmp_path, "lora.rank=3"),
        digest(tmp_path, identifier="qvx"),
        digest(tmp_path, photos=(1, 0)),
        digest(tmp_path, subject=Subject("rex", "cat", ())),
        digest(tmp_path, subject=Subject("rex", "dog", (), caption="a drawing of {identifier}")),
    ]
    assert len({plain, *others}) == 7
