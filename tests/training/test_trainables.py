"""What trains: its start, its names, its rates, and its way into the models."""

import pytest
import torch

from dbtrain.engines.world import World
from dbtrain.models.adapters import layers
from dbtrain.training.session import Base
from dbtrain.training.trainables import (
    final_state,
    final_weights,
    fresh_adapter,
    lora_alpha,
    make_stack,
    make_trainable,
)
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


def test_without_a_rate_of_their_own_text_encoders_take_the_denoisers():
    base = base_of("train.text_encoder=true", "train.lr=2e-3")
    assert [group.lr for group in make_stack(base.family, base.models, base.settings, 1)] == [2e-3, 2e-3]


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
