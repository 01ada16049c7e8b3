"""A whole run's evaluation: every finished subject on one warm base, and the table over subjects."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dbtrain.errors import DataError, DbtrainError
from dbtrain.evaluate.features import EMBEDDED
from dbtrain.evaluate.intervals import AVERAGES, Interval, averaged
from dbtrain.evaluate.judge import Judge, load_judge
from dbtrain.evaluate.protocol import RESULT, SCHEMA, Settings, evaluate_finished
from dbtrain.evaluate.scores import SCORES, title
from dbtrain.families import FAMILIES
from dbtrain.results.finished import WarmBase, finished_config, own_device
from dbtrain.results.record import RECORD
from dbtrain.storage.atomic import write_file

ROWS = {"scores": "tuned", "base": "base", "real": "photos"}
"""Rows of the table, named as in a subject's evaluation.json, and their titles."""
SMALL_WORLD = (
    "the embedded encoders know a small drawn world; for photographs name others, such as "
    "--identity facebook/dino-vits16 --clip openai/clip-vit-base-patch32"
)


def subject_folders(folder: Path) -> list[Path]:
    """The finished subjects of a run folder, or the one that the folder is. Raises DataError where there is none."""
    if (folder / RECORD).exists():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"subjects/*/{RECORD}"))
    if not found:
        raise DataError(f"{folder}: holds no finished subject; give the --out of `dbtrain train`, or OUT/subjects/ID")
    return found


def evaluate(
    folder: Path, settings: Settings, chosen: Sequence[str] = (), say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The table over a run's subjects, which is also written to `folder`/evaluation.json; or that of a single subject.

    chosen: ids of subjects to evaluate now; the table holds all that were judged in the same way. A subject that fails
    is named under `failed` and does not affect the others. Raises the first failure if all subjects fail.
    """
    folders = [path for path in subject_folders(folder) if not chosen or path.name in chosen]
    missing = set(chosen) - {path.name for path in folders}
    if missing:
        raise DataError(f"{folder}: has no finished subject {', '.join(sorted(missing))}")
    judge = load_judge(settings.identity, settings.clip, own_device().type, settings.distance)
    results, failed = [], {}
    for path, outcome in _evaluated(folders, settings, judge):
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
    folders: Sequence[Path], settings: Settings, judge: Judge
) -> Iterable[tuple[Path, dict[str, Any] | DbtrainError]]:
    """Each folder with its evaluation or what went wrong, folders of one base after another."""
    warm = WarmBase()
    ordered: dict[str, list[Path]] = {}
    for path in folders:
        try:
            ordered.setdefault(finished_config(path, settings.overrides).model.model_dump_json(), []).append(path)
        except DbtrainError as error:
            yield path, error
    for path in (path for group in ordered.values() for path in group):
        try:
            config = finished_config(path, settings.overrides)
            models = warm.load(config.model)
            yield path, evaluate_finished(path, models, FAMILIES[config.model.family], settings, judge)
        except DbtrainError as error:
            yield path, error


def write_summary(folder: Path, failed: dict[str, str] | None = None, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The table over all evaluated subjects of a run, also written to `folder`/evaluation.json.

    Subjects judged by another protocol or other encoders than most are counted under `left_out`; those whose file is
    damaged are among `failed`.
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
        told = "".join(f"\n{reason}" for reason in failed.values())
        raise DataError(f"{folder}: holds no evaluated subject; run `dbtrain evaluate {folder}`{told}")
    usual = Counter(way for way, _ in results).most_common(1)[0][0]
    alike = [result for way, result in results if way == usual]
    found = {**summary(alike), "left_out": len(results) - len(alike), "failed": failed, "notes": list(notes)}
    write_file(folder / RESULT, json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False).encode())
    return found


def _way(result: dict[str, Any]) -> str:
    """How a subject was judged, as one text."""
    kept = ("name", "images", "class_images", "steps", "guidance", "resolution", "seed")
    protocol = {key: result["protocol"][key] for key in kept}
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
    found = {}
    for name in SCORES:
        cells = [result[row][name] for result in results if result[row].get(name, {}).get("value") is not None]
        if cells:
            interval = averaged([cell["value"] for cell in cells], [cell["count"] for cell in cells], average)
            found[name] = interval.row()
    return found


def _counts(results: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Images of each row; the base model's are counted once for all subjects that share them."""
    files: dict[str, set[str]] = {}
    for result in results:
        for image in result["images"]:
            own = "" if image["row"] == "base" else result["subject"]
            files.setdefault(image["row"], set()).add(f"{own}:{image['file']}")
    return {**{row: len(found) for row, found in files.items()}, "real": sum(result["photos"] for result in results)}


def _short(result: dict[str, Any]) -> dict[str, Any]:
    values = {row: {name: cell["value"] for name, cell in result[row].items()} for row in ROWS}
    kinds = sorted({warning["kind"] for warning in result["warnings"]})
    return {"subject": result["subject"], "class": result["class"], **values, "warnings": kinds}


def line(result: dict[str, Any]) -> str:
    """A subject's scores in one line, then its warnings."""
    scores = "  ".join(f"{title(name)} {cell['value']:.3f}" for name, cell in result["scores"].items())
    return scores + "".join(f"\n  {warning['kind']}: {warning['text']}" for warning in result["warnings"])


def text_table(found: dict[str, Any], most: int = 40) -> str:
    """The run's table as plain text: scores by row, macro with intervals and micro, then up to `most` subjects."""
    names = [name for name in SCORES if any(name in found["macro"][row] for row in ROWS)]
    heads = [f"{one}, macro" for one in ROWS.values()] + [f"{one}, micro" for one in ROWS.values()]
    lines = [f"{'':<14}" + "".join(f"{head:>23}" for head in heads[:3]) + "".join(f"{head:>15}" for head in heads[3:])]
    for name in names:
        cells = [_cell(found["macro"][row].get(name)) for row in ROWS]
        means = [_cell(found["micro"][row].get(name)).partition(" ")[0] for row in ROWS]
        lines.append(
            f"{title(name):<14}" + "".join(f"{cell:>23}" for cell in cells) + "".join(f"{cell:>15}" for cell in means)
        )
    if 1 < found["subjects"] <= most:
        lines += ["", f"{'subject':<18}" + "".join(f"{title(name):>13}" for name in names)]
        for one in found["by_subject"]:
            cells = [f"{one['scores'][name]:.3f}" if name in one["scores"] else "" for name in names]
            told = "".join(f"  {kind}!" for kind in one["warnings"])
            lines.append(f"{one['subject']:<18.18}" + "".join(f"{cell:>13}" for cell in cells) + told)
    return "\n".join(one.rstrip() for one in [*lines, "", *_legend(found)])


def _legend(found: dict[str, Any]) -> list[str]:
    counts, encoders = ", ".join(f"{count} {row}" for row, count in found["counts"].items()), found["encoders"]
    lines = [
        f"{found['subjects']} subjects, protocol {found['protocol']['name']}; images: {counts}",
        ("95% intervals, bootstrap over subjects" if found["subjects"] > 1 else "no intervals over a single subject")
        + "; PRES is better when lower",
        f"DINO and PRES by {encoders['identity']}, CLIP by {encoders['clip']}, DIV by {encoders['distance']}",
    ]
    small = any(name.startswith(f"{EMBEDDED}/") for name in encoders.values())
    notes = [*found.get("notes", ()), *([SMALL_WORLD] if small and found["bases"] != [EMBEDDED] else [])]
    return [*lines, *(f"note: {note}" for note in notes)]


def _cell(interval: dict[str, Any] | None) -> str:
    """`0.689 [0.471, 0.906]`; `0.689` where there is no interval; nothing for None."""
    known: dict[str, Any] = {key: math.nan if value is None else value for key, value in (interval or {}).items()}
    return str(Interval(**known)) if known else ""
