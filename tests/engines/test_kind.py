"""Which engine `engine.kind: auto` is."""

import pytest

from dbtrain.engines.kind import resolved_engine
from dbtrain.errors import ConfigError
from dbtrain.settings.recipes import load

AUTO = "engine.kind=auto"


def of(*words, ranks=1):
    settings, why = resolved_engine(load("tiny", (AUTO, *words)), ranks)
    return settings.engine.kind, settings.engine.packed.size, why


def test_a_lora_in_one_process_is_a_pack_of_one():
    assert of() == ("packed", 1, "packed: a LoRA in one process")
    assert of("engine.packed.size=4")[:2] == ("packed", 4)


@pytest.mark.parametrize(
    "words, ranks, why",
    [
        ((), 2, "2 processes share each subject"),
        (("train.method=full",), 1, "train.method must be lora"),
        (("engine.zero.stage=3",), 1, "engine.zero is set"),
        (("data.buckets=true",), 1, "data.buckets is on"),
        (("train.batch=2", "train.micro_batch=1"), 1, "train.micro_batch is 1"),
    ],
)
def test_what_a_pack_cannot_do_goes_through_deepspeed(words, ranks, why):
    kind, _, reason = of(*words, ranks=ranks)
    assert kind == "zero" and reason.startswith(f"zero: {why}")


def test_a_kind_that_was_asked_for_stays():
    config = load("tiny", ("engine.kind=zero",))
    assert resolved_engine(config, 1) == (config, "")


def test_what_only_a_pack_can_do_is_refused_at_several_processes_before_anything_is_loaded():
    config = load("tiny", (AUTO, "train.stop_loss=0.1"))
    assert resolved_engine(config, 1)[0].engine.kind == "packed"
    with pytest.raises(ConfigError, match=r"train.stop_loss: .*engine.kind: auto is zero here: 2 processes"):
        resolved_engine(config, 2)
    with pytest.raises(ConfigError, match=r"train.stop_loss"):
        load("tiny", (AUTO, "train.stop_loss=0.1", "train.method=full"))
