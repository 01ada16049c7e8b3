"""A whole run's evaluation: every finished subject on one loaded base, and the table over subjects."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError, DbtrainError
from dbtrain.evaluate import RESULT
from dbtrain.evaluate.features import EMBEDDED
from dbtrain.evaluate.intervals import AVERAGES, averaged, shown
from dbtrain.evaluate.judge import Judge, load_judge
from dbtrain.evaluate.protocol import SCHEMA, Protocol, evaluate_finished
from dbtrain.evaluate.scores import SCORES, title
from dbtrain.evaluate.together import draw_together
from dbtrain.families import FAMILIES
from dbtrain.results.finished import WarmBase, finished_config, own_device
from dbtrain.results.record import RECORD
from dbtrain.storage.atomic import write_file

ROWS = {"scores": "tuned", "base": "base", "real": "photos"}
"""Rows of the table by their names in a subject's evaluation.json, with their titles."""
SMALL_WORLD = (
    "the embedded encoders know a small drawn world; for photographs name others, such as "
    "--identity facebook/dino-vits16 --clip openai/clip-vit-base-patch32"
)


def subject_folders(folder: Path) -> list[Path]:
    """The finished subjects of a run folder, or `folder` if it is a subject's. Raises DataError if there is none."""
    if (folder / RECORD).exists():
        return [folder]
    folders = sorted(path.parent for path in folder.glob(f"subjects/*/{RECORD}"))
    if not folders:
        raise DataError(f"{folder}: holds no finished subject; give the --out of `dbtrain train`, or OUT/subjects/ID")
    return folders


def evaluate(
    folder: Path, protocol: Protocol, chosen: Sequence[str] = (), say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The table over a run's subjects, which is also written to `folder`/evaluation.json; or that of a single subject.

    chosen: ids of subjects to evaluate now; the table holds all that were evaluated in the same way. A subject that
    fails is named under `failed`, and the others are evaluated. Raises the first failure if all subjects fail.
    """
    folders = [path for path in subject_folders(folder) if not chosen or path.name in chosen]
    missing = set(chosen) - {path.name for path in folders}
    if missing:
        raise DataError(f"{folder}: has no finished subject {', '.join(sorted(missing))}")
    judge = load_judge(protocol.identity, protocol.clip, own_device().type, protocol.distance)
    results, failed = [], {}
    for path, outcome in _evaluated(folders, protocol, judge):
        if isinstance(outcome, DbtrainError):
            failed[path.name] = outcome
            say(f"{path.name}: failed: {outcome}")
        else:
            results.append(outcome)
            say(f"{path.name}: {line(outcome)}")
    if not results:
        raise next(iter(failed.values()))
    reasons = {name: str(error) for name, error in failed.items()}
    notes = [judge.note] if judge.note else []
    if folder in folders:
        return {**summary(results), "failed": reasons, "notes": notes}
    return write_summary(folder, reasons, notes)


def _evaluated(
    folders: Sequence[Path], protocol: Protocol, judge: Judge
) -> Iterable[tuple[Path, dict[str, Any] | DbtrainError]]:
    """Each folder with its evaluation or its error, grouped by base, so that each base is loaded once."""
    warm = WarmBase()
    by_base: dict[str, list[Path]] = {}
    for path in folders:
        try:
            config = finished_config(path, protocol.overrides)
            bases = [config.model, *(stage.model for stage in config.stages)]
            by_base.setdefault(" ".join(base.model_dump_json() for base in bases), []).append(path)
        except DbtrainError as error:
            yield path, error
    for group in by_base.values():
        config = finished_config(group[0], protocol.overrides)
        with suppress(DbtrainError):  # of the base: each subject says so below
            draw_together(group, warm.load(config), FAMILIES[config.model.family], protocol)
    for path in (path for group in by_base.values() for path in group):
        try:
            config = finished_config(path, protocol.overrides)
            models = warm.load(config)
            yield path, evaluate_finished(path, models, FAMILIES[config.model.family], protocol, judge)
        except DbtrainError as error:
            yield path, error


def write_summary(folder: Path, failed: dict[str, str] | None = None, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The table over all evaluated subjects of a run, also written to `folder`/evaluation.json.

    Subjects with another protocol or other encoders than most subjects are counted under `left_out`. Those whose file
    is damaged are named under `failed`.
    """
    results, failed = [], dict(failed or {})
    for path in sorted(folder.glob(f"subjects/*/{RESULT}")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            json.dumps(summary([result]), allow_nan=False)
            results.append((_way(result), result))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            failed.setdefault(path.parent.name, f"{path}: is damaged ({error!r}); evaluate this subject again")
    if not results:
        reasons = "".join(f"\n{reason}" for reason in failed.values())
        raise DataError(f"{folder}: holds no evaluated subject; run `dbtrain evaluate {folder}`{reasons}")
    usual = Counter(way for way, _ in results).most_common(1)[0][0]
    alike = [result for way, result in results if way == usual]
    table = {**summary(alike), "left_out": len(results) - len(alike), "failed": failed, "notes": list(notes)}
    write_file(folder / RESULT, json.dumps(table, indent=1, allow_nan=False, ensure_ascii=False).encode())
    return table


def _way(result: dict[str, Any]) -> str:
    """A text that is equal for two subjects if their scores can be compared: protocol and encoders."""
    compared = ("name", "images", "class_images", "steps", "guidance", "resolution", "seed")
    protocol = {key: result["protocol"][key] for key in compared}
    return json.dumps([protocol, result["encoders"]], sort_keys=True)


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table over subjects from their evaluations: average -> row -> score -> value and interval over subjects."""
    table = {average: {row: _averaged_row(results, row, average) for row in ROWS} for average in AVERAGES}
    first = results[0]
    return {
        "schema": SCHEMA,
        "protocol": {
            key: value for key, value in first["protocol"].items() if key not in ("superclass", "class_prompt")
        },
        "encoders": first["encoders"],
        "bases": sorted({result["base_model"] for result in results}),
        "subjects": len(results),
        "counts": _counts(results),
        **table,
        "warnings": dict(Counter(warning["kind"] for result in results for warning in result["warnings"])),
        "by_subject": [_short(result) for result in results],
    }


def _averaged_row(results: Sequence[dict[str, Any]], row: str, average: str) -> dict[str, dict[str, Any]]:
    intervals = {}
    for name in SCORES:
        cells = [result[row][name] for result in results if result[row].get(name, {}).get("value") is not None]
        if cells:
            interval = averaged([cell["value"] for cell in cells], [cell["count"] for cell in cells], average)
            intervals[name] = interval.row("subjects")
    return intervals


def _counts(results: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Images of each row. Images of the base model that subjects share are counted once."""
    files: dict[str, set[str]] = {}
    for result in results:
        for image in result["images"]:
            owner = "" if image["row"] == "base" else result["subject"]
            files.setdefault(image["row"], set()).add(f"{owner}:{image['file']}")
    return {**{row: len(names) for row, names in files.items()}, "real": sum(result["photos"] for result in results)}


def _short(result: dict[str, Any]) -> dict[str, Any]:
    values = {row: {name: cell["value"] for name, cell in result[row].items()} for row in ROWS}
    kinds = sorted({warning["kind"] for warning in result["warnings"]})
    return {"subject": result["subject"], "class": result["class"], **values, "warnings": kinds}


def line(result: dict[str, Any]) -> str:
    """A subject's scores in one line, then its warnings, a line each."""
    scores = "  ".join(f"{title(name)} {cell['value']:.3f}" for name, cell in result["scores"].items())
    return scores + "".join(f"\n  {warning['kind']}: {warning['text']}" for warning in result["warnings"])


def text_table(table: dict[str, Any], most: int = 40) -> str:
    """The run's table as plain text: macro means with intervals, micro means, then the subjects if at most `most`."""
    names = [name for name in SCORES if any(name in table["macro"][row] for row in ROWS)]
    heads = [f"{row + ', macro':>23}" for row in ROWS.values()] + [f"{row + ', micro':>15}" for row in ROWS.values()]
    lines = [f"{'':<14}" + "".join(heads)]
    for name in names:
        macro, micro = ([table[average][row].get(name, {"value": None}) for row in ROWS] for average in AVERAGES)
        cells = [f"{shown(cell):>23}" for cell in macro] + [f"{shown({**cell, 'low': None}):>15}" for cell in micro]
        lines.append(f"{title(name):<14}" + "".join(cells))
    if 1 < table["subjects"] <= most:
        lines += ["", f"{'subject':<18}" + "".join(f"{title(name):>13}" for name in names)]
        for subject in table["by_subject"]:
            scores = subject["scores"]
            cells = [f"{scores[name]:>13.3f}" if name in scores else " " * 13 for name in names]
            warned = "".join(f"  {kind}!" for kind in subject["warnings"])
            lines.append(f"{subject['subject']:<18.18}" + "".join(cells) + warned)
    return "\n".join(line.rstrip() for line in [*lines, "", *_legend(table, names)])


def _legend(table: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Lines below the table that say how its numbers came about; names: of the scores in it."""
    counts, encoders = ", ".join(f"{count} {row}" for row, count in table["counts"].items()), table["encoders"]
    lower = [title(name) for name in names if SCORES[name].better == "lower"]
    by_role = {role: [title(name) for name in names if SCORES[name].encoder == role] for role in encoders}
    lines = [
        f"{table['subjects']} subjects, protocol {table['protocol']['name']}; images: {counts}",
        ("95% intervals, bootstrap over subjects" if table["subjects"] > 1 else "no intervals over a single subject")
        + "".join(f"; {name} is better when lower" for name in lower),
        "; ".join(f"{', '.join(scores)} by {encoders[role]}" for role, scores in by_role.items() if scores),
    ]
    small = any(name.startswith(f"{EMBEDDED}/") for name in encoders.values())
    notes = [*table.get("notes", ()), *([SMALL_WORLD] if small and table["bases"] != [EMBEDDED] else [])]
    return [*lines, *(f"note: {note}" for note in notes)]
