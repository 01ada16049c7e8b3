"""The arithmetic that all engines share: who draws which sample, and at what learning rate."""

import pytest

from dbtrain.engines.engine import BatchPlan, keeps_whole, lr_scale, plan_batches
from dbtrain.engines.world import World
from dbtrain.errors import ConfigError
from dbtrain.settings.config import EngineConfig, TrainConfig, ZeroConfig

DIVISORS = [
    (batch, micro, world)
    for batch in range(1, 25)
    for world in range(1, batch + 1)
    if batch % world == 0
    for micro in (None, *range(1, batch // world + 1))
    if micro is None or (batch // world) % micro == 0
]


def test_slots_are_the_global_batch_exactly_once():
    assert len(DIVISORS) > 200
    for batch, micro, size in DIVISORS:
        plan = plan_batches(batch, micro, size)
        assert plan.batch == batch == plan.micro * plan.accumulation * size
        drawn = [
            slot
            for turn in range(plan.accumulation)
            for rank in range(size)
            for slot in plan.slots(World(rank, size, "cpu"), turn)
        ]
        assert sorted(drawn) == list(range(batch))


def test_without_a_micro_batch_there_is_no_accumulation():
    assert plan_batches(12, None, 3) == BatchPlan(12, 4, 1)
    assert plan_batches(12, 2, 3) == BatchPlan(12, 2, 2)


@pytest.mark.parametrize(
    ("batch", "micro", "world", "words"),
    [
        (3, None, 2, "train.batch: 3 instance samples cannot be shared by 2 ranks; use a multiple of 2"),
        (1, None, 2, "use a multiple of 2"),
        (8, 3, 2, "train.micro_batch: 3 does not divide the 4 samples of each of 2 ranks"),
        (4, 4, 2, "train.micro_batch: 4 does not divide the 2"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers(batch, micro, world, words):
    with pytest.raises(ConfigError, match=words):
        plan_batches(batch, micro, world)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (3, 10), (9, 10), (1, 100)])
def test_the_rate_rises_to_its_peak_and_never_is_zero(schedule, warmup, steps):
    train = TrainConfig(schedule=schedule, warmup_steps=warmup, steps=steps)
    scales = [lr_scale(step, train, steps) for step in range(steps)]
    assert all(0 < scale <= 1 for scale in scales)
    assert scales[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    assert scales[warmup] == 1
    after = scales[warmup:]
    assert after == sorted(after, reverse=True)
    if schedule == "constant":
        assert set(after) == {1.0}
    else:
        assert len(set(after)) == len(after)


def test_linear_and_cosine_meet_half_way():
    for schedule in ("linear", "cosine"):
        assert lr_scale(5, TrainConfig(schedule=schedule), 10) == pytest.approx(0.5)
    assert lr_scale(9, TrainConfig(schedule="linear"), 10) == pytest.approx(0.1)
    assert lr_scale(2, TrainConfig(schedule="cosine"), 8) == pytest.approx((1 + 0.5**0.5) / 2)


def test_only_zero_3_takes_a_ranks_weights_apart():
    assert [keeps_whole(EngineConfig(zero=ZeroConfig(stage=stage))) for stage in range(4)] == [True, True, True, False]
    assert keeps_whole(EngineConfig(kind="packed"))
