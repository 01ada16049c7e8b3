"""What trains: its start, its names, its rates, and its way into the models."""

import pytest
import torch

from dbtrain.engines.world import World
from dbtrain.errors import ConfigError, DataError
from dbtrain.models.adapters import from_state, layers
from dbtrain.results.publish import publish_lora
from dbtrain.training.session import Base
from dbtrain.training.trainables import (
    final_state,
    final_weights,
    fresh_adapter,
    initial_digest,
    lora_alpha,
    make_stack,
    make_trainable,
)
from tests.kit.adapter_rows import read_rows
from tests.kit.main_job import small_config

TEXT = ("train.text_encoder=true", "train.lr=2e-3", "train.text_encoder_lr=5e-4")


def base_of(*words):
    return Base.load(small_config(*words), World(0, 1, "cpu"))


def named(groups):
    return {name: param for group in groups for name, param in group.params.items()}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_component_trains_at_its_own_rate_under_its_own_name(method):
    base = base_of(f"train.method={method}", *TEXT)
    groups = make_trainable(base.family, base.models, base.settings, "rex")
    assert [group.lr for group in groups] == [2e-3, 5e-4]
    for group, component in zip(groups, ("unet.", "text_encoder.")):
        assert group.params and all(name.startswith(component) for name in group.params)
    trained = {id(param) for param in named(groups).values()}
    for module in (base.models.denoiser, base.models.vae, *base.models.text_encoders.values()):
        assert all(param.requires_grad == (id(param) in trained) for param in module.parameters())


def test_layers_that_match_nothing_are_answered_with_the_familys_own():
    base = base_of("lora.targets=[attention.to_q]")
    said = r"lora.targets: no layer of UNet2DConditionModel matches attention.to_q; its recipe has attn\*.to_q, "
    with pytest.raises(ConfigError, match=said):
        make_stack(base.family, base.models, base.settings, 1)


def test_without_a_rate_of_their_own_text_encoders_take_the_denoisers():
    base = base_of("train.text_encoder=true", "train.lr=2e-3")
    assert [group.lr for group in make_stack(base.family, base.models, base.settings, 1)] == [2e-3, 2e-3]


def test_lora_plus_parts_a_components_matrices_by_rate():
    base = base_of("train.text_encoder=true", "train.lr=1e-3", "train.text_encoder_lr=5e-4", "lora.up_ratio=16")
    groups = make_stack(base.family, base.models, base.settings, 2)
    assert [group.lr for group in groups] == [1e-3, 16e-3, 5e-4, 8e-3]
    for group, end in zip(groups, ("down_NRD", "up_NDR") * 2):
        assert group.params and all(name.endswith(end) for name in group.params)
    assert len(named(groups)) == sum(len(group.params) for group in groups)


def test_a_subject_starts_alike_alone_and_in_a_pack():
    """Alone its layers are started in place; a pack copies the same matrices into its row, of a wider stack."""
    base = base_of(*TEXT)
    alone = named(make_trainable(base.family, base.models, base.settings, "rex"))
    before = {name: param.detach().clone() for name, param in alone.items()}
    base.restore()
    wider = base.settings.lora.model_copy(update={"rank": 5})
    make_stack(base.family, base.models, base.settings.model_copy(update={"lora": wider}), 3)
    fresh = fresh_adapter(base.family, base.models, base.settings, "rex")
    assert fresh.keys() == before.keys()
    assert all(torch.equal(fresh[name].float(), before[name]) for name in before)
    assert any(matrix.abs().max() > 0 for matrix in fresh.values())


def test_alpha_is_the_rank_unless_it_is_set():
    assert lora_alpha(small_config("lora.rank=3")) == 3
    assert lora_alpha(small_config("lora.rank=3", "lora.alpha=8")) == 8
    base = base_of("lora.rank=4", "lora.alpha=2")
    make_stack(base.family, base.models, base.settings, 2)
    assert all(layer.scale_N.tolist() == [0.5, 0.5] for _, layer in layers(base.models.denoiser))


def test_the_average_is_given_away_where_one_was_kept():
    base = base_of()
    params = named(make_trainable(base.family, base.models, base.settings, "rex"))
    master = {name: torch.full_like(param, 2.0) for name, param in params.items()}
    ema = {name: torch.full_like(param, 3.0) for name, param in params.items()}
    assert final_state({"master": master}) is master
    final_weights(base.family, base.models, {"master": master, "ema": ema}, "cpu")
    assert all((param == 3).all() for param in params.values())


def moved(base):
    """An adapter of rank 2 that has been trained, as weights."""
    groups = make_trainable(base.family, base.models, base.settings, "tom")
    state = {name: torch.randn_like(param) for name, param in named(groups).items()}
    weights = from_state(state, base.models.components(base.family.denoiser), lora_alpha(base.settings))
    base.restore()
    return weights


@pytest.mark.parametrize("words", [(), ("lora.rank=5", "lora.alpha=2"), ("lora.alpha=7",)])
def test_a_start_from_an_adapter_does_what_the_adapter_does(tmp_path, words):
    base = base_of()
    weights = moved(base)
    publish_lora(tmp_path, weights, {}, False)
    config = small_config(f"lora.init={tmp_path}", *words)
    make_trainable(base.family, base.models, config, "rex")
    components = base.models.components(base.family.denoiser)
    started, row = read_rows(components, 0, lora_alpha(config)), fresh_adapter(base.family, base.models, config, "rex")
    for component, matrices in weights.matrices.items():
        for path, (down, up) in matrices.items():
            a, b = started.matrices[component][path]
            want = up @ down * (weights.alpha / weights.rank)
            assert torch.allclose(b @ a * (lora_alpha(config) / config.lora.rank), want, atol=1e-5)
            assert a.abs().min() > 0, "ranks above the adapter's own can learn"
            assert torch.equal(row[f"{component}.{path}.down_NRD"][0].float(), a)
            assert torch.equal(row[f"{component}.{path}.up_NDR"][0].float(), b)
    base.restore()


def test_an_adapter_that_does_not_fit_is_refused_before_a_step(tmp_path):
    base = base_of()
    publish_lora(tmp_path, moved(base), {}, False)
    for words, match in (
        (("lora.rank=1",), "has rank 2, lora.rank is 1"),
        (("lora.targets=[to_q]",), "which this run does not train"),
    ):
        with pytest.raises(DataError, match=match):
            make_trainable(base.family, base.models, small_config(f"lora.init={tmp_path}", *words), "rex")
        base.restore()
    with pytest.raises(DataError, match="none is no file"):
        initial_digest(small_config(f"lora.init={tmp_path}/none"))
