"""What a study found: each variant's cost and scores, the front, the cheapest that is good enough, and main effects.

Pure functions of the rows. All means are over subjects that every variant finished, so that variants are compared on
the same subjects; intervals are bootstrap intervals over these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from dbtrain.evaluate.intervals import Interval, averaged
from dbtrain.evaluate.scores import SCORES, title
from dbtrain.study.variants import Variant, value_of

COST = "cost_s"
SAME_COST = 1.02
"""Costs that differ by less count as equal: they are measured."""
SHOWN = ("dino", "clip_t_plain", "pres", "div")
"""Scores that decide: identity, agreement with the prompt, drift of the class, variety."""


@dataclass(frozen=True)
class Row:
    """A variant on a subject. cost_s: device-seconds of the subject's own training, of `steps` steps. begun_at: steps
    that another training made for it, whose seconds are not in a new row's. scores: by their names in evaluation.json.
    """

    variant: str
    subject: str
    class_noun: str
    cost_s: float
    scores: Mapping[str, float]
    steps: int = 1
    begun_at: int = 0

    def value(self, name: str) -> float:
        """A score, or the cost; NaN where it was not measured."""
        return self.cost_s if name == COST else self.scores.get(name, float("nan"))


@dataclass(frozen=True)
class Line:
    """A variant's means over subjects, by the names of scores and `cost_s`."""

    variant: Variant
    means: Mapping[str, Interval]

    def __getitem__(self, name: str) -> float:
        """A mean."""
        return self.means[name].value

    @property
    def cost(self) -> float:
        """Device-seconds a subject."""
        return self[COST]


@dataclass(frozen=True)
class Goal:
    """What a recipe must reach, as means over subjects; None asks for nothing."""

    identity: float | None = None
    pres: float | None = None

    def met_by(self, line: Line) -> bool:
        """Whether a variant reaches it."""
        identity = self.identity is None or line["dino"] >= self.identity
        return identity and (self.pres is None or line["pres"] <= self.pres)

    def surely_met_by(self, line: Line) -> bool:
        """Whether its whole intervals do."""
        identity = self.identity is None or line.means["dino"].low >= self.identity
        return identity and (self.pres is None or line.means["pres"].high <= self.pres)


@dataclass(frozen=True)
class Effect:
    """What changing one key from one value to another did, all else being equal. ratio: of the costs. differences:
    second minus first of each score, with intervals over subjects. pairs: of variants compared."""

    key: str
    first: str
    second: str
    ratio: float
    differences: Mapping[str, Interval]
    pairs: int

    @property
    def text(self) -> str:
        """The effect in words: what is shown, by the whole interval lying on one side of 0, and what is not."""
        shown, silent = [], []
        for name, interval in self.differences.items():
            if interval.low > 0 or interval.high < 0:
                better = (interval.value > 0) == (SCORES[name].better == "higher")
                verb = "raises" if interval.value > 0 else "lowers"
                size = f"{abs(interval.value):.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
                shown.append(f"{verb} {title(name)} by {size} ({'better' if better else 'worse'})")
            else:
                silent.append(f"{title(name)} {interval.value:+.3f}")
        cost = f"costs {self.ratio:.2f} times as much"
        parts = [cost, *shown, *([f"not shown: {', '.join(silent)}"] if silent else [])]
        return f"{self.key} from {self.first} to {self.second} {'; '.join(parts)}"


def common_subjects(rows: Sequence[Row], variants: Sequence[Variant]) -> list[str]:
    """Subjects that every variant has finished, in order."""
    having = {variant.name: {row.subject for row in rows if row.variant == variant.name} for variant in variants}
    return [subject for subject in dict.fromkeys(row.subject for row in rows)
            if all(subject in own for own in having.values())]  # fmt: skip


def table(rows: Sequence[Row], variants: Sequence[Variant]) -> list[Line]:
    """Every variant's means over the common subjects, the cheapest first."""
    subjects, known = common_subjects(rows, variants), {(row.variant, row.subject): row for row in rows}
    if not subjects:
        return []
    every = [known[variant.name, subject].scores for variant in variants for subject in subjects]
    names = [COST, *(name for name in SCORES if all(name in scores for scores in every))]
    lines = []
    for variant in variants:
        own = [known[variant.name, subject] for subject in subjects]
        means = {name: averaged([row.value(name) for row in own], [1] * len(own), "macro") for name in names}
        lines.append(Line(variant, means))
    return sorted(lines, key=lambda line: line.cost)


def front(lines: Sequence[Line], goal: Goal) -> list[Line]:
    """The variants than which none is both cheaper and better in identity, the cheapest first; of those that keep the
    goal's PRES, where there are any."""
    kept = [line for line in lines if goal.pres is None or line["pres"] <= goal.pres] or list(lines)
    best: list[Line] = []
    for line in sorted(kept, key=lambda line: (line.cost, -line["dino"])):
        if not best or line["dino"] > best[-1]["dino"]:
            best.append(line)
    return best


def cheapest(lines: Sequence[Line], goal: Goal) -> Line | None:
    """The cheapest variant that meets the goal by its means; None where none does."""
    return min((line for line in lines if goal.met_by(line)), key=lambda line: line.cost, default=None)


def effects(
    rows: Sequence[Row], variants: Sequence[Variant], vary: Sequence[tuple[str, Sequence[str]]]
) -> list[Effect]:
    """What each key did, from its first value to each other one, over all pairs of variants that differ in it alone."""
    subjects, known = common_subjects(rows, variants), {(row.variant, row.subject): row for row in rows}
    keys = [key for key, _ in vary]
    settings = {variant.name: {key: shown(value_of(variant.config, key)) for key in keys} for variant in variants}
    found = []
    for key in keys:
        values = list(dict.fromkeys(settings[variant.name][key] for variant in variants))
        for first, second in product(values[:1], values[1:]):
            pairs = [
                (a.name, b.name)
                for a, b in product(variants, variants)
                if (settings[a.name][key], settings[b.name][key]) == (first, second)
                and all(settings[a.name][other] == settings[b.name][other] for other in keys if other != key)
            ]
            if pairs and subjects:
                found.append(_effect(key, first, second, pairs, subjects, known))
    return found


def worse(rows: Sequence[Row], variants: Sequence[Variant], goal: Goal) -> dict[str, str]:
    """The variants that are clearly worse than another one, with the reason: the other costs no more, keeps the goal's
    PRES if there is one, and has more identity by a whole interval of differences within subjects."""
    subjects, known = common_subjects(rows, variants), {(row.variant, row.subject): row for row in rows}
    lines, found = table(rows, variants), {}
    for line, other in product(lines, lines):
        if other.cost > line.cost * SAME_COST or (goal.pres is not None and other["pres"] > goal.pres):
            continue
        own, others = ([known[one.variant.name, s].value("dino") for s in subjects] for one in (line, other))
        gain = averaged([b - a for a, b in zip(own, others)], [1] * len(own), "macro")
        if gain.low > 0:
            more = f"{gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}]"
            better = f"{other.variant.title} costs no more and has a DINO higher by {more}"
            found[line.variant.name] = f"{better}, on {len(own)} subjects"
    return found


def shown(value: Any) -> str:
    """A setting's value as a recipe has it."""
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else "null" if value is None else f"{value}"


def _effect(
    key: str, first: str, second: str, pairs: list[tuple[str, str]], subjects: list[str], known: Mapping[Any, Row]
) -> Effect:
    def mean(name: str, subject: str, side: int) -> float:
        return sum(known[pair[side], subject].value(name) for pair in pairs) / len(pairs)

    names = [name for name in SHOWN if all(name in row.scores for row in known.values())]
    ones = [1] * len(subjects)
    differences = {
        name: averaged([mean(name, s, 1) - mean(name, s, 0) for s in subjects], ones, "macro") for name in names
    }
    cost = [sum(mean(COST, subject, side) for subject in subjects) for side in (0, 1)]
    return Effect(key, first, second, cost[1] / cost[0] if cost[0] else float("nan"), differences, len(pairs))


def whole_cost(line: Line, prior_s: float | None, subjects: int, classes: int) -> str:
    """What so many subjects cost with a variant, in words."""
    own = line.cost * subjects
    if prior_s is None:
        return f"{subjects} subjects: {own:.0f} device-seconds, class images not counted (none were drawn here)"
    whole = f"{own + prior_s * classes:.0f} device-seconds, {prior_s * classes:.0f} of them for class images"
    return f"{subjects} subjects of {classes} classes: {whole}"


def text_table(lines: Sequence[Line], goal: Goal) -> str:
    """The study as plain text, a variant a line; those of the front have a star."""
    best = {line.variant.name for line in front(lines, goal)}
    names = [name for name in SHOWN if all(name in line.means for line in lines)]
    heads = f"{'':2}{'device-s':>9}" + "".join(f"{title(name):>24}" for name in names) + "  variant"
    text = [heads]
    for line in lines:
        cells = "".join(f"{cell(line.means[name]):>24}" for name in names)
        text.append(f"{'*' if line.variant.name in best else ' ':2}{line.cost:>9.2f}{cells}  {line.variant.title}")
    return "\n".join(text)


def cell(interval: Interval) -> str:
    """A mean with its interval, which a single subject has not."""
    if interval.low != interval.low:
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
