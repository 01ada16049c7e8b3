"""Variants: which there are, how they are named, and which share a pack."""

import pytest

from dbtrain.errors import ConfigError
from dbtrain.study.variants import RECIPE, Design, name_of, own_values, read_vary, shorter, waves
from dbtrain.training.identity import subject_config
from dbtrain.values import Subject

VARY = (("train.lr", ("1e-3", "2.0e-3")), ("train.batch", ("2", "4")))


def titles(design):
    return [variant.title for variant in design.variants()]


def test_keys_are_varied_one_at_a_time_or_as_a_grid_or_at_random():
    # tiny_packed has these very values, so the changes that change nothing are not trained twice.
    recipe = ("train.lr=2.0e-3", "train.batch=4")
    one = Design("tiny_packed", recipe, VARY)
    assert titles(one) == ["the recipe as it is", "train.lr=1e-3", "train.batch=2"]
    assert one.variants()[0].name == RECIPE
    grid = Design("tiny_packed", recipe, VARY, grid=True)
    assert len(titles(grid)) == 4 == len({variant.name for variant in grid.variants()})
    some = Design("tiny_packed", recipe, VARY, random=3)
    assert len(titles(some)) == 3 and set(titles(some)) < set(titles(grid)) and titles(some) == titles(some)
    assert len(titles(Design("tiny_packed", recipe, VARY, random=99))) == 4


def test_variants_share_a_pack_where_rows_may_differ():
    vary = (*VARY, ("prior.weight", ("0", "0.5", "1")), ("train.steps", ("8", "9")))
    design = Design("tiny_packed", (), vary, grid=True)
    variants = design.variants()
    groups = design.groups(variants)
    shared = {(group.config.train.batch, group.config.prior.weight > 0) for group in groups}
    assert len(groups) == 4 == len(shared) and sum(len(group.variants) for group in groups) == len(variants) == 24
    for group in groups:
        for variant in group.variants:
            subject = Subject("rex", "dog", (), **own_values(variant))
            trained = subject_config(group.config, subject)
            assert trained == variant.config.model_copy(update={"engine": trained.engine})


def test_a_training_goes_on_from_the_longest_one_that_is_shorter_where_its_rate_stays():
    vary = (("train.steps", ("20", "60", "40")), ("train.lr", ("1e-3", "2e-3")))
    variants = Design("tiny_packed", ("train.schedule=constant",), vary, grid=True).variants()
    told = [[variant.title.replace("train.", "") for variant in wave] for wave in waves(variants)]
    assert told == [[f"steps={steps} lr={rate}" for rate in ("1e-3", "2e-3")] for steps in (20, 40, 60)]
    assert shorter(variants[2], variants) == variants[4] and shorter(variants[4], variants) == variants[0]
    for word in ("train.schedule=linear", "train.stop_loss=0.1", "train.stop.metric=loss"):
        alone = Design("tiny_packed", ("train.schedule=constant", word), vary, grid=True).variants()
        assert waves(alone) == [alone]


def test_a_recipe_of_one_subject_at_a_time_is_packed_and_a_whole_model_is_not():
    def kind(*words):
        design = Design("tiny", words, (("train.lr", ("1e-3", "1e-4")),))
        (group,) = design.groups(design.variants())
        return group.config.engine.kind

    assert (kind(), kind("train.method=full")) == ("packed", "zero")


def test_without_priors_in_the_recipe_a_prior_weight_makes_a_pack_of_its_own():
    design = Design("tiny_packed", ("prior.weight=0",), (("prior.weight", ("0.5",)),))
    assert len(design.groups(design.variants())) == 2


@pytest.mark.parametrize(
    "text, expected",
    [
        ("train.lr=1e-3,2e-3", ("train.lr", ("1e-3", "2e-3"))),
        ("lora.targets=[a,b],[c]", ("lora.targets", ("[a,b]", "[c]"))),
        ("objective.timesteps=uniform", ("objective.timesteps", ("uniform",))),
    ],
)
def test_values_are_split_at_commas_outside_brackets(text, expected):
    assert read_vary(text) == expected


@pytest.mark.parametrize("text", ["train.lr", "train.lr=", "=1", "train.lr=1,,2"])
def test_what_varies_nothing_is_refused(text):
    with pytest.raises(ConfigError, match="KEY=V1,V2"):
        read_vary(text)


def test_an_unknown_key_or_value_is_refused_by_the_settings():
    with pytest.raises(ConfigError, match=r"train\.rate"):
        Design("tiny_packed", (), (("train.rate", ("1",)),)).variants()


def test_names_fit_a_folder_and_differ():
    long = [(("lora.targets", f"[{'attn*.to_q,' * 9}{end}]"),) for end in ("a", "b")]
    names = [name_of(change) for change in (*long, (("train.lr", "1.0e-3"),), (("train.lr", "1e-3"),))]
    assert len(set(names)) == 4 and all(len(name) <= 60 and "/" not in name for name in names)
    assert names[3] == "lr-1e-3"
