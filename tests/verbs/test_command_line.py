"""What trainers' command lines have in common."""

import pytest

from dbtrain.errors import ConfigError
from dbtrain.verbs.command_line import Command, by_flag, nested, plain, set_optimizer


def test_values_as_numbers_or_text():
    assert [plain(text) for text in ("3", "1e-4", "x", "")] == [3, 1e-4, "x", ""]
    assert by_flag({"a b": "why", "c": "so"}) == {"a": "why", "b": "why", "c": "so"}


def test_a_number_is_above_zero():
    command = Command("x.py", {"a": "0", "b": "many", "c": "2"}, {"d": "5"})
    assert [command.number("c", 1), command.number("d", 1), command.number("e", 7)] == [2, 5, 7]
    for flag in "ab":
        with pytest.raises(ConfigError, match=f"--{flag}: got"):
            command.number(flag, 1)


def test_settings_are_nested_without_defaults():
    assert nested({"train.steps": 800, "train.lr": 0.5, "seed": 3}) == {"seed": 3, "train": {"lr": 0.5}}


@pytest.mark.parametrize("name, rate, said", [("AdamW", 1.0, 0), ("adamw8bit", 1.0, 0), ("prodigy", 1e-4, 1),
                                              ("Lion", 1.0, 1), ("DAdaptAdam", 1e-4, 1)])  # fmt: skip
def test_rates_of_other_optimizers(name, rate, said):
    command = Command("x.py", {"optimizer": name, "lr": "1.0"}, {}, {"train.lr": 1.0})
    set_optimizer(command, "optimizer", {"lr": "train.lr", "text": "train.text_encoder_lr"})
    assert command.settings == {"train.lr": rate} and len(command.dropped) == said
