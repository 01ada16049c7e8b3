"""A run in numbers, as pure functions of its rows (`facts.row`): counts, rates, costs, worst and slowest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from statistics import mean, median
from typing import Any

from dbtrain.evaluate.scores import title
from dbtrain.report import charts
from dbtrain.report.facts import SHOWN
from dbtrain.report.reading import moment

Rows = Sequence[Mapping[str, Any]]
STATES = ("finished", "running", "waiting", "quarantined", "cancelled", "skipped", "forgotten", "unfinished")
"""The order of states on the page. Other states follow by name."""
WORST, SLOWEST, BINS = 20, 10, 40
FEW = 12
"""Fewest values for a histogram; fewer are read more easily in the table."""
SPANS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
"""Widths of a bar of time, in seconds. Wider bars are of whole days."""


def counts(rows: Rows) -> list[tuple[str, int]]:
    """(state, subjects) of every state that occurs."""
    subjects = Counter(row["state"] for row in rows)
    known = {state: subjects.pop(state) for state in STATES if state in subjects}
    return [*known.items(), *sorted(subjects.items())]


def stage_table(rows: Rows) -> dict[str, Any]:
    """{"stages": [(name, seconds, subjects, mean seconds, share)], "total"}; the total is the sum of the seconds."""
    seconds: Counter[str] = Counter()
    subjects: Counter[str] = Counter()
    for row in rows:
        seconds.update(row["stages"])
        subjects.update(row["stages"].keys())
    total = sum(seconds.values())
    table = [
        (name, spent, subjects[name], spent / subjects[name], spent / total if total else 0.0)
        for name, spent in seconds.most_common()
    ]
    return {"stages": table, "total": total}


def worst(rows: Rows) -> tuple[str | None, list[Mapping[str, Any]]]:
    """(score, rows): the subjects least like their photos by DINO, or by CLIP-I if no subject has DINO."""
    for key in ("dino", "clip_i"):
        scored = [row for row in rows if row[key] is not None]
        if scored:
            return key, sorted(scored, key=lambda row: (row[key], row["id"]))[:WORST]
    return None, []


def slowest(rows: Rows) -> list[Mapping[str, Any]]:
    """The subjects that took longest."""
    timed = [row for row in rows if row["seconds"] is not None]
    return sorted(timed, key=lambda row: (-row["seconds"], row["id"]))[:SLOWEST]


def totals(rows: Rows, price: float | None) -> dict[str, Any]:
    """Device seconds of all subjects and the median of one, subjects an hour from the first end to the last, and cost.

    A value that cannot be computed is None, and so are costs without a price of a device hour.
    """
    spent, ends = _known(rows, "device_s"), _ends(rows)
    span = ends[-1] - ends[0] if len(ends) > 1 else 0.0
    cost = sum(spent) / 3600 * price if price is not None else None
    return {
        "device_s": sum(spent),
        "median_s": median(spent) if spent else None,
        "per_hour": (len(ends) - 1) * 3600 / span if span else None,
        "cost": cost,
        "cost_each": cost / len(ends) if cost is not None and ends else None,
    }


def _known(rows: Rows, key: str) -> list[float]:
    return [row[key] for row in rows if row[key] is not None]


def _ends(rows: Rows) -> list[float]:
    """The moments at which subjects ended, in order."""
    return sorted(filter(None, (moment(row["finished"]) for row in rows)))


def scores(rows: Rows) -> list[dict[str, Any]]:
    """Mean of each score that a subject has, and its histogram; None for few values."""
    shown = []
    for key in SHOWN:
        values = _known(rows, key)
        if values:
            name, middle = title(key), mean(values)
            extremes = f"from {min(values):.3f} to {max(values):.3f}"
            sentence = f"{name}: mean {middle:.3f} over {len(values)} subjects, {extremes}"
            chart = histogram(name, values, sentence, "{:.2f}".format) if len(values) >= FEW else None
            shown.append({"name": name, "mean": middle, "chart": chart})
    return shown


def histogram(title: str, values: Sequence[float], sentence: str, label: Callable[[float], str]) -> charts.Chart:
    """The number of values in each of equal parts of their range."""
    low, high = min(values), max(values)
    parts = min(32, max(4, len(values) // 4))
    width = (high - low) / parts or 1.0
    tally = [0] * parts
    for value in values:
        tally[min(int((value - low) / width), parts - 1)] += 1
    edges = [low + i * width for i in range(parts + 1)]
    ticks = {at: label(at) for at in charts.nice(edges[0], edges[-1], 6)}
    return charts.bars(title, edges, tally, ticks, sentence, "subjects")


def durations(rows: Rows) -> charts.Chart | None:
    """The histogram of the subjects' device seconds; None for few values."""
    values = _known(rows, "device_s")
    if len(values) < FEW:
        return None
    span = f"from {min(values):.4g} to {max(values):.4g}"
    sentence = f"Device seconds a subject: median {median(values):.4g}, {span}"
    return histogram("Device seconds", values, sentence, charts.short)


def throughput(rows: Rows) -> charts.Chart | None:
    """The number of subjects that ended in each span of time; None if fewer than two did."""
    ends = _ends(rows)
    if len(ends) < 2:
        return None
    width = bar_width(ends[-1] - ends[0], BINS)
    first = ends[0] // width * width
    tally = [0] * (int((ends[-1] - first) // width) + 1)
    for end in ends:
        tally[int((end - first) // width)] += 1
    edges = [first + i * width for i in range(len(tally) + 1)]
    until = clock(ends[-1], clock(ends[0], True)[:10] != clock(ends[-1], True)[:10])
    sentence = f"{len(ends)} subjects ended between {clock(ends[0], True)} and {until} UTC"
    y_label = f"subjects per {spell(width).removeprefix('1 ')}"
    return charts.bars("Throughput", edges, tally, time_ticks(edges[0], edges[-1]), sentence, y_label)


def cost(rows: Rows, price: float | None) -> charts.Chart | None:
    """Device hours, or their price, summed over time; None if fewer than two subjects ended."""
    ended = [(moment(row["finished"]), row["device_s"]) for row in rows if row["device_s"] is not None]
    spent = sorted((end, seconds) for end, seconds in ended if end)
    if len(spent) < 2:
        return None
    unit, hour = ("device hours", 1.0) if price is None else ("cost", price)
    ends, sums = [end for end, _ in spent], list(accumulate(seconds / 3600 * hour for _, seconds in spent))
    ticks, sentence = time_ticks(ends[0], ends[-1]), f"{sums[-1]:.4g} {unit} for {len(spent)} subjects"
    return charts.lines("Cost", {unit: list(zip(ends, sums))}, sentence, y_label=unit, x_labels=ticks, zero=True)


def clock(seconds: float, date: bool) -> str:
    """A moment, in seconds since 1970, as UTC text; with `date`, the day too."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M" if date else "%H:%M")


def bar_width(span: float, most: int) -> int:
    """Seconds of one bar so that at most `most` bars fill the span: one of SPANS, or whole days."""
    return next((width for width in SPANS if span / width <= most), 86400 * (1 + int(span / 86400 / most)))


def time_ticks(low: float, high: float) -> dict[float, str]:
    """Moments on a time axis with their labels, about six."""
    width = bar_width(high - low, 6)
    form = "%b %d" if width >= 86400 else "%H:%M" if width >= 60 else "%H:%M:%S"
    moments = [i * width for i in range(int(-(-low // width)), int(high // width) + 1)]
    return {float(at): datetime.fromtimestamp(at, UTC).strftime(form) for at in moments}


def spell(seconds: float) -> str:
    """A duration as short text: 42 s, 3.5 min, 12 h, 3 days."""
    for least, per, unit in ((86400 * 2, 86400, "days"), (3600, 3600, "h"), (60, 60, "min")):
        if seconds >= least:
            return f"{seconds / per:.3g} {unit}"
    return f"{seconds:.3g} s"
