"""Charts: places against hand-made arithmetic."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as some

from dbtrain.report.charts import BOTTOM, LEFT, POINTS, RIGHT, SMALL, TOP, bars, lines, nice, short, thin

WIDTH, HEIGHT = SMALL


def test_bars_stand_on_the_axis_and_the_highest_reaches_the_top():
    chart = bars("t", [0, 1, 2, 4], [1, 4, 2], {0: "0", 4: "4"}, "s", "y")
    room = HEIGHT - BOTTOM - TOP
    assert [bar["h"] for bar in chart.bars] == [room / 4, room, room / 2]
    assert [bar["y"] + bar["h"] for bar in chart.bars] == [HEIGHT - BOTTOM] * 3
    step = (WIDTH - LEFT - RIGHT) / 4
    assert [bar["x"] for bar in chart.bars] == [LEFT, LEFT + step, LEFT + 2 * step]
    assert chart.x_ticks == [(LEFT, "0"), (WIDTH - RIGHT, "4")]


def test_a_line_spans_the_chart_and_falls_when_values_fall():
    chart = lines("t", {"loss": [(0, 1.0), (50, 0.5), (100, 0.0)]}, "s")
    points = [tuple(map(float, point.split(","))) for point in chart.lines[0]["path"][1:].split("L")]
    assert [x for x, _ in points] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    assert points[0][1] < points[1][1] < points[2][1]
    assert points[0][1] >= TOP and points[2][1] <= HEIGHT - BOTTOM
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.11)  # rounded to 0.1


@pytest.mark.parametrize("line", [[(3, 7.0)], [(3, 7.0), (4, 7.0)], [(3, 0.0)], [(1, 5.0), (1, 6.0)]])
def test_single_and_constant_lines_are_drawn(line):
    path = lines("t", {"loss": line}, "s").lines[0]["path"]
    assert path.startswith("M") and "nan" not in path


def test_long_lines_are_thinned_to_means_of_equal_runs():
    line = [(float(i), float(i % 2)) for i in range(10 * POINTS)]
    short_line = thin(line, POINTS)
    assert len(short_line) == POINTS
    assert short_line[0] == (4.5, 0.5) and short_line[-1] == (10 * POINTS - 5.5, 0.5)


@given(some.floats(-1e9, 1e9), some.floats(1e-6, 1e9), some.integers(2, 8))
def test_ticks_are_round_ordered_and_inside(low, span, most):
    assume(abs(low) < 1e6 * span)  # beyond that, floats themselves are too coarse
    ticks = nice(low, low + span, most)
    assert len(ticks) <= most + 1
    assert all(low - span * 1e-6 <= at <= low + span * (1 + 1e-6) for at in ticks)
    if len(ticks) > 2 and abs(low) < 1e3 * span:
        steps = [b - a for a, b in pairwise(ticks)]
        assert max(steps) == pytest.approx(min(steps), rel=1e-6)
        leading = f"{steps[0]:.3e}"[:5]
        assert leading in ("1.000", "2.000", "5.000")


@pytest.mark.parametrize("value, shown", [(0.25, "0.25"), (40, "40"), (12000, "12k"), (0, "0"), (1 / 3, "0.3333")])
def test_short_numbers(value, shown):
    assert short(value) == shown
