"""Facts into HTML: the jinja2 environment, the context of each page, and what a user can copy from it."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dbtrain import __version__
from dbtrain.evaluate.scores import title
from dbtrain.report import charts, summary
from dbtrain.report.facts import SHOWN, TAIL, Facts, differences, score_table
from dbtrain.report.reading import number, text
from dbtrain.results.card import python_snippet

TEMPLATES = Path(__file__).parent / "templates"
ASSETS = ("report.css", "report.js")
COLUMNS = ("id", "class", "state", "attempts", "seconds", "device_s", "rate", "loss", *SHOWN, "warnings", "finished")
"""Columns of the table, in order; one that nobody has a value for is left out."""
DATA = (*COLUMNS, "reason", "photo", "sample")
"""What the page's script is given of each row, as lists in this order."""
OVER = ("finished", "quarantined", "cancelled", "skipped")
"""States in which nothing changes any more."""


@dataclass(frozen=True)
class View:
    """What is the same on all pages of one build."""

    run: str
    """The run's folder as the user names it; it stands in commands."""
    built: str
    refresh_s: int | None = None
    """Seconds after which pages of an ongoing run load themselves again; None for a report that is done."""
    price: float | None = None
    """Price of a device hour, for the cost chart."""
    origin: Mapping[str, Any] | None = None
    """The run's own command: {"manifest", "config", "overrides", "out", "skip_bad"}."""


@cache
def environment() -> Environment:
    """The templates, with everything escaped and undefined names an error."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
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
    """A digest of everything that pages are made by: another one means that all are made again."""
    files = [*sorted(TEMPLATES.iterdir()), *sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files if path.is_file())).hexdigest()[:16]


def fixed(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals, or a dash."""
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

    retries: the ledger's count by cause; None for a run without one.
    """
    key, poor = summary.worst(rows)
    used = [name for name in COLUMNS if any(row[name] not in (None, "") for row in rows)]
    if all(row["device_s"] == row["seconds"] for row in rows):
        used = [name for name in used if name != "device_s"]
    return (
        environment()
        .get_template("index.html")
        .render(
            view=view,
            title=Path(view.run).resolve().name or view.run,
            count=len(rows),
            counts=summary.counts(rows),
            totals=summary.totals(rows, view.price),
            stages=summary.stage_table(rows),
            retries=sorted((retries or {}).items(), key=lambda item: (-item[1], item[0])),
            scores=summary.scores(rows),
            overall=overall(evaluation),
            worst_by=title(key) if key else None,
            worst_key=key,
            worst=poor,
            slowest=summary.slowest(rows),
            charts=[
                chart
                for chart in (summary.throughput(rows), summary.cost(rows, view.price), summary.durations(rows))
                if chart
            ],
            common=sorted(
                (key, value if isinstance(value, str) else ", ".join(value)) for key, value in common.items()
            ),
            notes=notes,
            data={
                "columns": DATA,
                "shown": used,
                "states": summary.STATES,
                "scores": {name: title(name) for name in SHOWN},
                "rows": [[tidy(row[name]) for name in DATA] for row in rows],
            },
        )
    )


def overall(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The run's own score table, from DIR/evaluation.json: its macro means, or the scores that it holds directly."""
    macro = evaluation.get("macro")
    return score_table(
        macro
        if isinstance(macro, Mapping) and "scores" in macro
        else {**evaluation, "scores": macro or evaluation.get("scores")}
    )


def tidy(value: Any) -> Any:
    """A number with six figures, which halves the page's data; anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def subject_page(
    view: View, facts: Facts, pictures: Mapping[str, Any], common: Mapping[str, Any], checkpoint: str | None
) -> str:
    """The page of one subject."""
    return (
        environment()
        .get_template("subject.html")
        .render(
            view=view,
            over=facts.state in OVER,
            facts=facts,
            caption=text(facts.record.get("caption"), 500),
            identifier=text(facts.record.get("identifier"), 100),
            reason=text(facts.ledger.get("reason")),
            facts_list=about(facts, checkpoint),
            photos=pictures["photos"],
            strips=pictures["strips"],
            evaluated=pictures["evaluated"],
            curve=loss_curve(facts.log),
            scores=[{**each, "scale": interval_scale(each)} for each in facts.scores],
            differences=differences(facts.settings, common),
            tail=[log_line(line) for line in facts.log[-TAIL:]],
            stages=summary.stage_table([{"stages": facts.stages}]),
            snippets=snippets(view, facts),
        )
    )


def about(facts: Facts, checkpoint: str | None) -> list[tuple[str, str]]:
    """(name, value) of the page's list of facts, those that are known."""
    record, ledger = facts.record, facts.ledger
    seconds, device, rate, memory = (
        facts.seconds,
        facts.device_seconds,
        facts.rate,
        number(record.get("peak_memory_gib")),
    )
    attempts, steps, loss = facts.attempts, number(record.get("steps")), facts.loss
    known = [
        ("Method", text(record.get("method"), 40)),
        ("Steps", f"{steps:.0f}" if steps is not None else ""),
        ("Final loss" if record else "Loss so far", fixed(loss, 4) if loss is not None else ""),
        ("Time", summary.spell(seconds) if seconds is not None else ""),
        ("Device time", summary.spell(device) if device is not None and device != seconds else ""),
        ("Steps a second", charts.short(rate) if rate is not None else ""),
        ("Peak memory", f"{memory:.2f} GiB" if memory is not None else ""),
        ("Attempts", str(attempts) if attempts is not None else ""),
        ("Worker", text(ledger.get("worker"), 100)),
        ("Seed", text(record.get("seed"), 40)),
        ("Base", text(record.get("base"), 300)),
        ("Finished", facts.finished),
        ("Newest checkpoint", checkpoint or ""),
        ("Run digest", text(record.get("run"), 80)[:16]),
    ]
    return [(name, value) for name, value in known if value]


def loss_curve(log: Sequence[Mapping[str, Any]]) -> charts.Chart | None:
    """The loss and its two parts by step; None for fewer than two points."""
    series = {}
    for name, label in (("loss", "loss"), ("loss_instance", "photos"), ("loss_prior", "class priors")):
        by_step = {
            step: value
            for line in log
            if (step := number(line.get("step"))) is not None and (value := number(line.get(name))) is not None
        }
        if len(by_step) > 1 and any(by_step.values()):
            series[label] = sorted(by_step.items())
    if "loss" not in series:
        return None
    first, last = series["loss"][0], series["loss"][-1]
    said = f"Loss {first[1]:.4f} at step {first[0]:.0f}, {last[1]:.4f} at step {last[0]:.0f}"
    return charts.lines("Loss", series, said, y_label="by step", size=charts.LARGE)


def interval_scale(score: Mapping[str, Any]) -> dict[str, float]:
    """Places of a score's interval, value, base and photos on a drawing of 0..120 units, which spans [0, 1]."""
    low, high = (score[part] if score[part] is not None else score["value"] for part in ("low", "high"))
    places = {
        "low": low,
        "high": high,
        "value": score["value"],
        "base": score["base"]["value"],
        "real": score["real"]["value"],
    }
    return {name: round(120 * min(max(at, 0.0), 1.0), 1) for name, at in places.items() if at is not None}


def log_line(line: Mapping[str, Any]) -> str:
    """A line of the log as short text."""
    return "  ".join(
        f"{text(key, 40)} {charts.short(found) if (found := number(value)) is not None else text(value, 200)}"
        for key, value in list(line.items())[:20]
    )


def snippets(view: View, facts: Facts) -> list[dict[str, str]]:
    """What a user copies: how to load the result, and how to go on with training; titles and texts."""
    folder = f"{view.run.rstrip('/')}/subjects/{facts.id}"
    again = {"title": "Resume or repeat", "text": resume(view, facts)}
    if not facts.record:
        return [again]
    known = {key: text(facts.record.get(key), 500) for key in ("base", "family", "method", "caption")}
    comfy = {
        "lora": f"dbtrain export {shlex.quote(folder)} --out ComfyUI/models/loras/{facts.id}.safetensors\n"
        f"# node LoraLoader: {facts.id}.safetensors",
        "full": f"cp -r {shlex.quote(folder + '/model')} ComfyUI/models/diffusers/{facts.id}\n"
        f"# node DiffusersLoader: {facts.id}",
    }["full" if known["method"] == "full" else "lora"]
    more = f"dbtrain generate {shlex.quote(folder)} --prompt 'a photo of {{subject}} in the snow'"
    return [
        {"title": "diffusers", "text": python_snippet(known, folder, f"{facts.id}.png")},
        # Quoted although it is a comment: a line break would end that, and zsh takes none from the keyboard.
        {"title": "ComfyUI", "text": f"{comfy}\n# prompt: {shlex.quote(one_line(known['caption']))}"},
        {"title": "More pictures", "text": more},
        again,
    ]


def one_line(words: str) -> str:
    """Words with a single blank for everything between them that no reader sees."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in words).split())


def resume(view: View, facts: Facts) -> str:
    """The command that goes on with a subject; MANIFEST stands where the run did not say which it was."""
    origin = view.origin or {}
    manifest = text(origin.get("manifest"), 1000) or "MANIFEST"
    recipe = text(origin.get("config"), 1000) or f"{view.run.rstrip('/')}/subjects/{facts.id}/config.yaml"
    fleet = bool(facts.ledger)
    words = ["dbtrain", "batch", "run", manifest] if fleet else ["dbtrain", "train", manifest, "--subject", facts.id]
    overrides = origin.get("overrides")
    words += ["--config", recipe, "--out", view.run]
    words += ["--skip-bad"] if origin.get("skip_bad") is True else []
    words += [text(each, 1000) for each in (overrides if isinstance(overrides, list) else [])]
    again = ["dbtrain", "batch", "retry", view.run, facts.id] if facts.state in ("quarantined", "cancelled") else []
    return "\n".join(shlex.join(line) for line in (again, words) if line)
