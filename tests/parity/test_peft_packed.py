"""Two subjects of a pack, each against PEFT's layers, AdamW and clip_grad_norm_ of torch on a model of its own."""

from types import SimpleNamespace

import pytest

from dbtrain.families import FAMILIES
from dbtrain.packing.pack import Pack, Start
from dbtrain.randomness import stream_key
from dbtrain.results.checkpoint import Checkpoint
from dbtrain.settings.config import LoraConfig, PriorConfig, RunConfig, TrainConfig
from dbtrain.training.trainables import fresh_adapter
from tests.parity.test_peft_lora import BATCH, CLOSE, difference, start, train_peft, with_unet

__all__ = ["start"]
STEPS = 12


def own_config(base: RunConfig, seed: int, lr: float, rank: int, clip: float, weight: float) -> RunConfig:
    train = TrainConfig(batch=BATCH, lr=lr, clip_norm=clip, steps=STEPS, weight_decay=0.02)
    own = {
        "seed": seed,
        "train": train,
        "lora": LoraConfig(rank=rank, alpha=rank / 2),
        "prior": PriorConfig(weight=weight),
    }
    return base.model_copy(update=own)


@pytest.fixture(scope="module")
def trained(start):
    """{name: (configuration, matrices before, matrices after, gradient norms)} of two subjects trained together."""
    base, models, told, batch = start
    models, family = with_unet(models), FAMILIES["sd"]
    configs = {"rex": own_config(base, 3, 1e-3, 4, 0.02, 0.5), "tom": own_config(base, 4, 2e-3, 2, 0.03, 2.0)}
    pack = Pack(family, models, configs["rex"], 3, 4, STEPS, told)
    bank = SimpleNamespace(draw=lambda step, slots: batch)
    before, rows, norms = {}, {"tom": 0, "rex": 2}, {"rex": [], "tom": []}
    for name, row in rows.items():
        fresh = fresh_adapter(family, models, configs[name], name)
        pack.seat(row, Start(name, configs[name], told, Checkpoint(0, "", {"master": fresh})))
        before[name] = matrices(pack, row)
    for step in range(STEPS):
        pack.advance(pack.batch([(row, bank, step) for row in rows.values()]))
        for name, row in rows.items():
            norms[name].append(pack.observe()[row].values["grad_norm"])
        pack.forget(rows.values())
    return {name: (configs[name], before[name], matrices(pack, row), norms[name]) for name, row in rows.items()}


def matrices(pack: Pack, row: int) -> dict:
    master = pack.engine.state(row)["master"]
    paths = sorted({name.rpartition(".")[0] for name in master})
    return {path.removeprefix("unet."): (master[f"{path}.down_NRD"][0], master[f"{path}.up_NDR"][0]) for path in paths}


@pytest.mark.parametrize("name", ["rex", "tom"])
def test_each_row_equals_peft_and_torch(start, trained, name):
    config, before, after, norms = trained[name]
    clip = config.train.clip_norm
    assert sum(norm > clip for norm in norms) > STEPS / 2
    own = {"steps": STEPS, "key": stream_key(config.seed, name), "lr": config.train.lr}
    weights, moves = difference(
        after, train_peft(start, before, clip=clip, scale_prior=config.prior.weight, **own), before
    )
    assert weights < CLOSE and moves < 10 * CLOSE
    other = train_peft(start, before, clip=clip, scale_prior=config.prior.weight / 2, **own)
    assert difference(after, other, before)[0] > 10 * CLOSE
