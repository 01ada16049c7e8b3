"""The pages as HTML: the jinja2 environment, the values in each template, and the commands to copy."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dbtrain import __version__
from dbtrain.evaluate.scores import title
from dbtrain.report import charts, summary
from dbtrain.report.facts import SHOWN, TAIL, Facts, differences, joined, score_table
from dbtrain.report.reading import number, text
from dbtrain.results.card import python_snippet

TEMPLATES = Path(__file__).parent / "templates"
ASSETS = ("report.css", "report.js")
COLUMNS = ("id", "class", "state", "attempts", "seconds", "device_s", "rate", "loss", *SHOWN, "warnings", "finished")
"""Columns of the table, in order. A column without any value is left out."""
DATA = (*COLUMNS, "reason", "photo", "sample")
"""The values of a row that the page's script gets, in this order."""
OVER = ("finished", "quarantined", "cancelled", "skipped", "forgotten")
"""States that do not change any more."""


@dataclass(frozen=True)
class View:
    """What all pages of one build show.

    run: the run's folder as the user names it, for commands. built: the time of the build. refresh_s: seconds after
    which pages of an ongoing run reload; None for never. price: of a device hour; None draws hours instead of costs.
    origin: the run's own command, {"manifest", "config", "overrides", "out", "skip_bad"}; None if it is not known.
    """

    run: str
    built: str
    refresh_s: int | None = None
    price: float | None = None
    origin: Mapping[str, Any] | None = None


@cache
def environment() -> Environment:
    """The templates. Everything in them is escaped, and an undefined name is an error."""
    loader = FileSystemLoader(TEMPLATES)
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {
        "fixed": fixed,
        "spell": summary.spell,
        "short": charts.short,
        "path": lambda name: quote(str(name)),
        "tone": lambda state: state if state in summary.STATES else "other",
    }
    env.globals |= {"version": __version__}
    return env


@cache
def version() -> str:
    """A digest of the report's code and templates. If it changes, all pages are made again."""
    files = [*sorted(TEMPLATES.iterdir()), *sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files if path.is_file())).hexdigest()[:16]


def fixed(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def index_page(
    view: View,
    rows: Sequence[Mapping[str, Any]],
    retries: Mapping[str, int] | None,
    evaluation: Mapping[str, Any],
    common: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    """The run's page: summary, charts, the worst and the slowest, and the data of the table and the gallery.

    retries: the ledger's count by cause; None for a run without a ledger.
    """
    worst_key, worst = summary.worst(rows)
    used = [name for name in COLUMNS if any(row[name] not in (None, "") for row in rows)]
    if all(row["device_s"] == row["seconds"] for row in rows):
        used = [name for name in used if name != "device_s"]
    charts_shown = (summary.throughput(rows), summary.cost(rows, view.price), summary.durations(rows))
    data = {
        "columns": DATA,
        "shown": used,
        "states": summary.STATES,
        "scores": {name: title(name) for name in SHOWN},
        "rows": [[tidy(row[name]) for name in DATA] for row in rows],
    }
    template = environment().get_template("index.html")
    return template.render(
        view=view,
        title=Path(view.run).resolve().name or view.run,
        count=len(rows),
        counts=summary.counts(rows),
        totals=summary.totals(rows, view.price),
        stages=summary.stage_table(rows),
        retries=sorted((retries or {}).items(), key=lambda item: (-item[1], item[0])),
        scores=summary.scores(rows),
        overall=score_table(evaluation.get("macro")),
        worst_by=title(worst_key) if worst_key else None,
        worst_key=worst_key,
        worst=worst,
        slowest=summary.slowest(rows),
        charts=[chart for chart in charts_shown if chart],
        common=[(key, joined(value)) for key, value in sorted(common.items())],
        notes=notes,
        data=data,
    )


def tidy(value: Any) -> Any:
    """A number with six figures, which halves the page's data; other values unchanged."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def subject_page(
    view: View, facts: Facts, pictures: Mapping[str, Any], common: Mapping[str, Any], checkpoint: str | None
) -> str:
    """The page of one subject."""
    template = environment().get_template("subject.html")
    return template.render(
        view=view,
        over=facts.state in OVER,
        facts=facts,
        caption=text(facts.record.get("caption"), 500),
        identifier=text(facts.record.get("identifier"), 100),
        reason=text(facts.ledger.get("reason")),
        facts_list=about(facts, checkpoint),
        **pictures,
        curve=loss_curve(facts.log),
        scores=[{**score, "scale": interval_scale(score)} for score in facts.scores],
        differences=differences(facts.settings, common),
        tail=[log_line(line) for line in facts.log[-TAIL:]],
        stages=summary.stage_table([{"stages": facts.stages}]),
        snippets=snippets(view, facts),
    )


def about(facts: Facts, checkpoint: str | None) -> list[tuple[str, str]]:
    """(name, value) of each known fact in the page's list."""
    record, device = facts.record, facts.device_seconds if facts.device_seconds != facts.seconds else None
    values = [
        ("Method", text(record.get("method"), 40)),
        ("Steps", _shown(number(record.get("steps")), "{:.0f}".format)),
        ("Final loss" if record else "Loss so far", _shown(facts.loss, "{:.4f}".format)),
        ("Time", _shown(facts.seconds, summary.spell)),
        ("Device time", _shown(device, summary.spell)),
        ("Steps a second", _shown(facts.rate, charts.short)),
        ("Peak memory", _shown(number(record.get("peak_memory_gib")), "{:.2f} GiB".format)),
        ("Attempts", _shown(facts.attempts, str)),
        ("Worker", text(facts.ledger.get("worker"), 100)),
        ("Seed", text(record.get("seed"), 40)),
        ("Base", text(record.get("base"), 300)),
        ("Enlarged by", ", ".join(f"{stage['base']} ({stage['folder']}/)" for stage in stages_of(record))),
        ("Finished", facts.finished),
        ("Newest checkpoint", checkpoint or ""),
        ("Run digest", text(record.get("run"), 80)[:16]),
    ]
    return [(name, value) for name, value in values if value]


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)


def loss_curve(log: Sequence[Mapping[str, Any]]) -> charts.Chart | None:
    """The chart of the loss and its two parts by step; None for fewer than two points."""
    series = {}
    for name, label in (("loss", "loss"), ("loss_instance", "photos"), ("loss_prior", "class priors")):
        points = [(number(line.get("step")), number(line.get(name))) for line in log]
        by_step = {step: value for step, value in points if step is not None and value is not None}
        if len(by_step) > 1 and any(by_step.values()):
            series[label] = sorted(by_step.items())
    if "loss" not in series:
        return None
    first, last = series["loss"][0], series["loss"][-1]
    sentence = f"Loss {first[1]:.4f} at step {first[0]:.0f}, {last[1]:.4f} at step {last[0]:.0f}"
    return charts.lines("Loss", series, sentence, y_label="by step", size=charts.LARGE)


def interval_scale(score: Mapping[str, Any]) -> dict[str, float]:
    """Places of a score's interval, value, base and photos on a scale of 120 units that spans [0, 1]."""
    value, base, real = score["value"], score["base"]["value"], score["real"]["value"]
    low, high = (value if score[end] is None else score[end] for end in ("low", "high"))
    marks = {"low": low, "high": high, "value": value, "base": base, "real": real}
    return {name: round(120 * min(max(at, 0.0), 1.0), 1) for name, at in marks.items() if at is not None}


def log_line(line: Mapping[str, Any]) -> str:
    """A line of the log as short text."""
    return "  ".join(
        f"{text(key, 40)} {_shown(number(value), charts.short) or text(value, 200)}"
        for key, value in list(line.items())[:20]
    )


def snippets(view: View, facts: Facts) -> list[dict[str, str]]:
    """{"title", "text"} of what a user can copy: how to load the result, and how to go on with training."""
    folder = f"{view.run.rstrip('/')}/subjects/{facts.id}"
    again = {"title": "Resume or repeat", "text": resume(view, facts)}
    if not facts.record:
        return [again]
    known = _told(facts.record) | {"caption": text(facts.record.get("caption"), 500), "stages": stages_of(facts.record)}
    if known["method"] == "full":
        comfy = f"cp -r {shlex.quote(folder + '/model')} ComfyUI/models/diffusers/{facts.id}\n"
        comfy += f"# node DiffusersLoader: {facts.id}"
    else:
        comfy = f"dbtrain export {shlex.quote(folder)} --out ComfyUI/models/loras/{facts.id}.safetensors\n"
        comfy += f"# node LoraLoader: {facts.id}.safetensors"
    more = f"dbtrain generate {shlex.quote(folder)} --prompt 'a photo of {{subject}} in the snow'"
    return [
        {"title": "diffusers", "text": python_snippet(known, folder, f"{facts.id}.png")},
        # A line break in the caption would end the comment, and an interactive zsh runs comments: so it is quoted.
        {"title": "ComfyUI", "text": f"{comfy}\n# prompt: {shlex.quote(one_line(known['caption']))}"},
        {"title": "More pictures", "text": more},
        again,
    ]


def _told(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of a stage's base, for code that loads it."""
    told = {key: text(record.get(key), 500) for key in ("base", "family", "method")}
    return told | ({"level": record["level"]} if isinstance(record.get("level"), int) else {})


def stages_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages that enlarge, as `_told`, with their folders; empty where there are none."""
    stages = record.get("stages")
    found = [stage for stage in stages[:9] if isinstance(stage, Mapping)] if isinstance(stages, list) else []
    return [_told(stage) | {"folder": text(stage.get("folder"), 80)} for stage in found]


def one_line(words: str) -> str:
    """The words with one blank between them in place of all white space and invisible characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in words).split())


def resume(view: View, facts: Facts) -> str:
    """The command that goes on with a subject. It says MANIFEST if the run's manifest is not known."""
    origin = view.origin or {}
    manifest = text(origin.get("manifest"), 1000) or "MANIFEST"
    recipe = text(origin.get("config"), 1000) or f"{view.run.rstrip('/')}/subjects/{facts.id}/config.yaml"
    fleet = bool(facts.ledger)
    words = ["dbtrain", "batch", "run", manifest] if fleet else ["dbtrain", "train", manifest, "--subject", facts.id]
    overrides = origin.get("overrides")
    words += ["--config", recipe, "--out", view.run]
    words += ["--skip-bad"] if origin.get("skip_bad") is True else []
    words += [text(setting, 1000) for setting in (overrides if isinstance(overrides, list) else [])]
    again = ["dbtrain", "batch", "retry", view.run, facts.id] if facts.state in ("quarantined", "cancelled") else []
    return "\n".join(shlex.join(line) for line in (again, words) if line)
