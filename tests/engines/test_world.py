"""What ranks settle together: one choice, and no rank that goes on where another cannot."""

import pytest

from dbtrain.engines.world import World, from_first, together
from dbtrain.errors import ConfigError, DataError, StopRequested
from tests.kit.ranks_at_work import on_ranks

ALONE = World(0, 1, "cpu")


def settle(world):
    """Every kind of settling, one after another, so that a rank out of step with the others would show."""
    seen = [from_first(world, lambda: f"chosen by {world.rank}"), together(world, lambda: world.rank)]

    def fails_on(*ranks):
        if world.rank in ranks:
            raise DataError(f"rank {world.rank} met it")

    def stops():
        raise StopRequested("asked to")

    for work in (
        lambda: from_first(world, lambda: fails_on(0)),
        lambda: together(world, lambda: fails_on(1)),
        lambda: together(world, lambda: fails_on(2, 1)),
        lambda: from_first(world, stops),
    ):
        with pytest.raises((DataError, StopRequested)) as caught:
            work()
        seen.append((type(caught.value).__name__, str(caught.value)))
    return [*seen, together(world, lambda: "still together")]


def test_ranks_get_one_choice_and_one_error():
    found = on_ranks(3, settle)
    assert [one[1] for one in found] == [0, 1, 2]
    assert [[one[0], *one[2:]] for one in found] == 3 * [
        [
            "chosen by 0",
            ("DataError", "rank 0 met it"),
            ("DataError", "rank 1 met it"),
            ("DataError", "rank 1 met it"),
            ("StopRequested", "asked to"),
            "still together",
        ]
    ]


def test_a_world_of_one_needs_no_process_group():
    assert from_first(ALONE, lambda: 5) == together(ALONE, lambda: 5) == 5
    with pytest.raises(ConfigError, match="as it is"):
        together(ALONE, lambda: (_ for _ in ()).throw(ConfigError("as it is")))
