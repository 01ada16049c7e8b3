"""Lists on the command line of `dbtrain bench` are checked before anything is measured."""

from typing import Literal

import pytest
from typer.testing import CliRunner

from dbtrain import cli
from dbtrain.errors import ConfigError
from dbtrain.verbs import bench

run = CliRunner().invoke


@pytest.mark.parametrize("words, message", [
    (["pack", "--sizes", "1,x"], "--sizes: got '1,x', want numbers from 1"),
    (["pack", "--sizes", "0"], "--sizes: got '0'"),
    (["pack", "--sizes", "1", "--subjects", "4,"], "--subjects: got '4,'"),
    (["step", "--sizes", ""], "--sizes: got ''"),
    (["step", "--capture", "off,grph"], "--capture: got 'off,grph', want auto, graph, compile, compiled_graph, off"),
    (["step", "--attention", "sdp"], "--attention: got 'sdp', want auto, sdpa"),
])  # fmt: skip
def test_lists_of_bench_are_checked(words, message):
    result = run(cli.app, ["bench", *words])
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_lists_are_numbers_and_choices():
    assert bench.numbers("1, 4,16", "--sizes") == [1, 4, 16]
    assert bench.choices("off,graph", "--capture", Literal["auto", "graph", "off"]) == ["off", "graph"]
    with pytest.raises(ConfigError, match="--capture: got 'off,', want auto, graph, off, with commas"):
        bench.choices("off,", "--capture", Literal["auto", "graph", "off"])
