"""Sums over a run, against loops over the same rows."""

import json
import math
import random
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as some

from dbtrain.report import summary
from dbtrain.report.charts import lines
from dbtrain.report.reading import number


def make_row(number, **values):
    row = dict.fromkeys(("attempts", "seconds", "device_s", "rate", "loss", "dino", "clip_i", "clip_t", "pres", "div"))
    return {**row, "id": f"s{number:03d}", "class": "dog", "state": "finished", "finished": "", "stages": {},
            "warnings": "", **values}  # fmt: skip


@pytest.fixture
def rows():
    dice = random.Random(7)
    return [
        make_row(
            i,
            state=dice.choice(["finished", "quarantined", "running", "odd"]),
            seconds=(spent := dice.uniform(1, 100)),
            device_s=2 * spent,
            dino=None if i % 5 == 0 else dice.random(),
            finished=f"2026-11-{1 + i // 24:02d}T{i % 24:02d}:30:00Z",
            stages={"train": spent * 0.75, "save": spent * 0.25} if i % 3 else {"train": spent},
        )
        for i in range(100)
    ]


def test_counts_add_up_in_a_fixed_order(rows):
    found = summary.counts(rows)
    assert sum(number for _, number in found) == 100
    assert [state for state, _ in found] == ["finished", "running", "quarantined", "odd"]


def test_stages_sum_to_the_total_and_to_all_seconds(rows):
    table = summary.stage_table(rows)
    assert sum(spent for _, spent, *_ in table["stages"]) == pytest.approx(table["total"], rel=1e-12)
    assert table["total"] == pytest.approx(sum(row["seconds"] for row in rows), rel=1e-12)
    assert sum(share for *_, share in table["stages"]) == pytest.approx(1, rel=1e-12)
    name, spent, count, mean, _ = table["stages"][1]
    assert (name, count) == ("save", 66) and mean == pytest.approx(spent / 66)


def test_worst_twenty_by_dino_and_by_clip_where_nobody_has_dino(rows):
    key, found = summary.worst(rows)
    scored = [row for row in rows if row["dino"] is not None]
    assert key == "dino" and len(found) == 20
    assert max(row["dino"] for row in found) <= min(row["dino"] for row in scored if row not in found)
    assert summary.worst([make_row(0, clip_i=0.5), make_row(1)])[0] == "clip_i"
    assert summary.worst([make_row(0)]) == (None, [])


def test_slowest_ten(rows):
    found = [row["seconds"] for row in summary.slowest(rows)]
    assert found == sorted((row["seconds"] for row in rows), reverse=True)[:10]


def test_totals_and_price(rows):
    found = summary.totals(rows, price=3.6)
    spent = sum(2 * row["seconds"] for row in rows)
    assert found["device_s"] == pytest.approx(spent)
    assert found["cost"] == pytest.approx(spent / 1000)
    assert found["cost_each"] == pytest.approx(spent / 100_000)
    assert found["per_hour"] == pytest.approx(1.0)  # one an hour, by construction
    assert summary.totals([], None) == {
        "device_s": 0, "median_s": None, "per_hour": None, "cost": None, "cost_each": None
    }  # fmt: skip


def test_throughput_counts_every_end_once_and_cost_ends_at_the_sum(rows):
    chart = summary.throughput(rows)
    unit = max(bar["h"] for bar in chart.bars)
    assert sum(bar["h"] for bar in chart.bars) / unit == pytest.approx(100 / 3, rel=0.02)  # bars of three hours
    assert chart.y_label == "subjects per 3 h"
    assert summary.cost(rows, None).summary.startswith(f"{sum(r['device_s'] for r in rows) / 3600:.4g} device hours")
    assert summary.throughput(rows[:1]) is None and summary.cost(rows[:1], None) is None


def test_a_histogram_counts_every_value_once():
    values = [0.1] * 5 + [0.9] * 7 + [0.5]
    chart = summary.histogram("t", values, "s", str)
    heights = [bar["h"] for bar in chart.bars]
    assert sum(heights) / max(heights) * 7 == pytest.approx(13, rel=0.01)
    assert len(summary.histogram("t", [2.0, 2.0, 2.0], "s", str).bars) == 4


YEARS = ["0001-01-01T00:00:00+23:59", "1969-07-20", "9999-12-31T23:59:59Z"]


@pytest.mark.parametrize("iso", ["", None, 5, "yesterday", "2026-13-01", "<script>", *YEARS])
def test_what_is_no_time_is_no_moment(iso):
    assert summary.moment(iso) is None


NUMBERS = some.floats(allow_nan=True, allow_infinity=True).map(number)
TIMES = some.datetimes(timezones=some.timezones()).map(datetime.isoformat) | some.text(max_size=9)


@given(some.lists(some.tuples(NUMBERS, NUMBERS, TIMES), max_size=30), some.none() | some.floats(0, 1e6))
def test_charts_can_be_drawn_of_all_that_is_read(found, price):
    """Whatever stands in a run's files: `number` and `moment` leave nothing that a chart cannot place."""
    rows = [
        make_row(i, seconds=first, device_s=first, dino=second, finished=text, stages={"train": first or 0})
        for i, (first, second, text) in enumerate(found)
    ]
    charts = [summary.throughput(rows), summary.cost(rows, price), summary.durations(rows)]
    charts += [score["chart"] for score in summary.scores(rows)]
    line = [(float(i), value) for i, (value, _, _) in enumerate(found) if value is not None]
    charts.append(lines("Loss", {"loss": line}, "") if line else None)
    places = [place for chart in filter(None, charts) for place, _ in (*chart.x_ticks, *chart.y_ticks)]
    assert all(math.isfinite(place) for place in places) and len(places) < 400
    json.dumps([summary.totals(rows, price), summary.stage_table(rows)], allow_nan=False)


def test_times_without_a_zone_are_utc():
    assert summary.moment("2026-11-22T18:00:00") == summary.moment("2026-11-22T18:00:00Z")
    assert summary.moment("2026-11-22T20:00:00+02:00") == summary.moment("2026-11-22T18:00:00Z")


@pytest.mark.parametrize("seconds, words", [(0.5, "0.5 s"), (90, "1.5 min"), (5400, "1.5 h"), (259200, "3 days")])
def test_durations_in_words(seconds, words):
    assert summary.spell(seconds) == words
