"""What a run amounts to, as pure functions of its rows (`facts.row`): counts, rates, costs, worst and slowest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from statistics import mean, median
from typing import Any

from dbtrain.evaluate.scores import title
from dbtrain.report import charts
from dbtrain.report.facts import SHOWN, about_score
from dbtrain.report.reading import moment

Rows = Sequence[Mapping[str, Any]]
STATES = ("finished", "running", "waiting", "quarantined", "cancelled", "skipped", "unfinished")
"""The order in which states are told; others follow by name."""
WORST, SLOWEST, BINS = 20, 10, 40
FEW = 12
"""Values below which a histogram says less than the table."""
SPANS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
"""Widths of a bar of time, in seconds; longer runs take whole days."""


def counts(rows: Rows) -> list[tuple[str, int]]:
    """(state, subjects) of every state that occurs."""
    found = Counter(row["state"] for row in rows)
    order = {state: i for i, state in enumerate(STATES)}
    return sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))


def stage_table(rows: Rows) -> dict[str, Any]:
    """{"stages": [(name, seconds, subjects, mean seconds, share)], "total"}: the seconds add up to the total."""
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
    """(score, rows): the subjects least like their photos by DINO, or by CLIP-I where nobody has DINO."""
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
    """Device seconds of all and by subject, wall time from the first to the last end, subjects an hour, cost."""
    spent = [row["device_s"] for row in rows if row["device_s"] is not None]
    ends = sorted(filter(None, (moment(row["finished"]) for row in rows)))
    span = ends[-1] - ends[0] if len(ends) > 1 else 0.0
    return {
        "device_s": sum(spent),
        "median_s": median(spent) if spent else None,
        "per_hour": (len(ends) - 1) * 3600 / span if span else None,
        "cost": sum(spent) / 3600 * price if price is not None else None,
        "cost_each": sum(spent) / 3600 * price / len(ends) if price is not None and ends else None,
    }


def scores(rows: Rows) -> list[dict[str, Any]]:
    """Mean and number of subjects of each score that somebody has, with its histogram over [low, high]."""
    found = []
    for key in SHOWN:
        values = [row[key] for row in rows if row[key] is not None]
        if values:
            about, name = about_score(key), title(key)
            span = f"from {min(values):.3f} to {max(values):.3f}"
            said = f"{name}: mean {mean(values):.3f} over {len(values)} subjects, {span}"
            found.append(
                {
                    **about,
                    "mean": mean(values),
                    "count": len(values),
                    "chart": histogram(name, values, said, "{:.2f}".format) if len(values) >= FEW else None,
                }
            )
    return found


def histogram(title: str, values: Sequence[float], said: str, label: Callable[[float], str]) -> charts.Chart:
    """How often values fall into each of equal parts of their range."""
    low, high = min(values), max(values)
    width = (high - low) / (parts := min(32, max(4, len(values) // 4))) or 1.0
    tally = [0] * parts
    for value in values:
        tally[min(int((value - low) / width), parts - 1)] += 1
    edges = [low + i * width for i in range(parts + 1)]
    ticks = {at: label(at) for at in charts.nice(edges[0], edges[-1], 6)}
    return charts.bars(title, edges, tally, ticks, said, y_label="subjects")


def throughput(rows: Rows) -> charts.Chart | None:
    """Subjects that ended in each span of time; None if fewer than two did."""
    ends = sorted(filter(None, (moment(row["finished"]) for row in rows)))
    if len(ends) < 2:
        return None
    whole = ends[-1] - ends[0]
    width = next((span for span in SPANS if whole / span <= BINS), 86400 * (1 + int(whole / 86400 / BINS)))
    first = ends[0] // width * width
    tally = [0] * (int((ends[-1] - first) // width) + 1)
    for end in ends:
        tally[int((end - first) // width)] += 1
    edges = [first + i * width for i in range(len(tally) + 1)]
    until = clock(ends[-1], clock(ends[0], True)[:10] != clock(ends[-1], True)[:10])
    said = f"{len(ends)} subjects ended between {clock(ends[0], True)} and {until} UTC"
    unit = spell(width).removeprefix("1 ")
    return charts.bars(
        "Throughput", edges, tally, time_ticks(edges[0], edges[-1]), said, y_label=f"subjects per {unit}"
    )


def cost(rows: Rows, price: float | None) -> charts.Chart | None:
    """Device hours, or their price, added up over time; None if fewer than two subjects ended."""
    spent = sorted(
        (end, row["device_s"]) for row in rows if row["device_s"] is not None and (end := moment(row["finished"]))
    )
    if len(spent) < 2:
        return None
    total, line = 0.0, []
    for end, seconds in spent:
        total += seconds / 3600 * (price if price is not None else 1.0)
        line.append((end, total))
    unit = "cost" if price is not None else "device hours"
    said = f"{total:.4g} {unit} for {len(spent)} subjects"
    return charts.lines(
        "Cost", {unit: line}, said, y_label=unit, x_labels=time_ticks(line[0][0], line[-1][0]), zero=True
    )


def durations(rows: Rows) -> charts.Chart | None:
    """How long subjects took; None if only a few are timed."""
    values = [row["device_s"] for row in rows if row["device_s"] is not None]
    if len(values) < FEW:
        return None
    said = f"Device seconds a subject: median {median(values):.4g}, from {min(values):.4g} to {max(values):.4g}"
    return histogram("Device seconds", values, said, charts.short)


def clock(seconds: float, date: bool) -> str:
    """A moment as UTC text."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M" if date else "%H:%M")


def time_ticks(low: float, high: float) -> dict[float, str]:
    """Moments on a time axis with their labels, six at most."""
    span = high - low
    width = next((each for each in SPANS if span / each <= 6), 86400 * (1 + int(span / 86400 / 6)))
    first = int(-(-low // width))
    form = "%b %d" if width >= 86400 else "%H:%M" if width >= 60 else "%H:%M:%S"
    found = [i * width for i in range(first, int(high // width) + 1)]
    return {float(at): datetime.fromtimestamp(at, UTC).strftime(form) for at in found}


def spell(seconds: float) -> str:
    """A duration in words short enough for a table: 42 s, 3.5 min, 12 h, 3 days."""
    for size, unit in ((86400 * 2, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            per = 86400 if unit == "days" else size
            return f"{seconds / per:.3g} {unit}"
    return f"{seconds:.3g} s"
