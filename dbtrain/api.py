"""The door for programs: what `import dbtrain` offers. Every function is a few lines around what a verb calls.

This module is loaded when one of its names is first used; `import dbtrain` alone loads nothing heavy. docs/api.md.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dbtrain.errors import ConfigError, DataError, DbtrainError, EngineError, StopRequested
from dbtrain.results.record import finished_record, read_record
from dbtrain.settings import recipes
from dbtrain.settings.marks import anchored
from dbtrain.storage.atomic import write_file
from dbtrain.training.session import Watch
from dbtrain.training.stopping import Stop

__all__ = ["ConfigError", "DataError", "DbtrainError", "EngineError", "Result", "Stop", "StopRequested", "Trained",
           "load", "score", "train_manifest", "train_subject"]  # fmt: skip
Logged = Callable[[str, int, int, Mapping[str, float]], object]
"""Called with a subject's id, the steps made, all its steps, and a log line's values: loss, lr, images_per_s ..."""
ROWS = "photos.jsonl"
"""Manifest that is written into the output folder for rows that a program gives."""
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Result:
    """A finished subject: its folder, and its record as in record.json."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def caption(self) -> str:
        """The caption that the subject was trained with: a prompt that draws it."""
        return str(self.record["caption"])

    def pipeline(self, weight: float = 1.0) -> Any:
        """A diffusers pipeline that knows the subject, with models of its own, on a GPU if there is one.

        weight: how much of the adapter is added to the base; 0 is the base alone.
        """
        from dbtrain.results.finished import own_pipeline

        return own_pipeline(self.folder, weight)


@dataclass(frozen=True)
class Trained:
    """What came of some subjects. failed: the error of each that was not trained, or not uploaded, by id."""

    results: Sequence[Result]
    failed: Mapping[str, DbtrainError]


def train_manifest(
    manifest: Path | str | Sequence[Mapping[str, Any]],
    out: Path | str,
    config: str = "sd15_lora",
    settings: Sequence[str] = (),
    *,
    subjects: Sequence[str] | None = None,
    pack: int | Literal["auto"] | None = None,
    publish_to: str | None = None,
    skip_bad: bool = False,
    logged: Logged | None = None,
    stop: Stop | None = None,
    quiet: bool = True,
) -> Trained:
    """What came of the subjects of a manifest, trained in this process. The same call again goes on, or does nothing.

    manifest: a file, or its rows: mappings with subject, class, images (paths from the current folder) and any other
    column. config: a shipped recipe's name, or a file. settings: `a.b=c`, as on the command line. subjects: ids, None
    for all. pack: how many subjects train in one step over one base, or "auto"; None trains one after another.
    publish_to: folder or address that finished subjects are uploaded to. stop: `stop.ask()`, from any thread or from
    `logged`, ends the training after its step, with a checkpoint.

    Raises ConfigError or DataError before any work, StopRequested after `stop.ask()`, and EngineError while another
    training of this process is under way.
    """
    out, words = Path(out), list(settings)
    if pack is not None:
        words += ["engine.kind=packed", f"engine.packed.size={pack}"]
    if publish_to is not None:
        words.append(f"publish.to={publish_to}")
    chosen = anchored(recipes.load(config, words))
    watch = Watch(quiet, logged=logged or (lambda *_: None), stop=stop or Stop())
    from dbtrain import train

    with _alone():
        path = Path(manifest) if isinstance(manifest, str | Path) else _written(manifest, out)
        records, failed = train.train_manifest(path, chosen, out, subjects, skip_bad=skip_bad, watch=watch)
    folders = [out / "subjects" / record["subject"] for record in records]
    return Trained([Result(folder, read_record(folder) or {}) for folder in folders], failed)


def train_subject(
    images: Path | str | Sequence[Path | str],
    class_noun: str,
    out: Path | str,
    config: str = "sd15_lora",
    settings: Sequence[str] = (),
    *,
    subject: str = "subject",
    row: Mapping[str, Any] | None = None,
    **options: Any,
) -> Result:
    """The result of one subject, trained in this process.

    images: a folder, a pattern, or files. subject: its id. row: further columns of a manifest, such as caption or
    steps. options: those of `train_manifest`, which see; what went wrong with the subject is raised.
    """
    rows = [{**(row or {}), "subject": subject, "class": class_noun, "images": images}]
    trained = train_manifest(rows, out, config, settings, **options)
    for error in trained.failed.values():
        raise error
    return trained.results[0]


def load(folder: Path | str) -> Result:
    """A finished subject, OUT/subjects/ID. Raises DataError if there is none, or if a file differs from its record."""
    return Result(Path(folder), finished_record(Path(folder)))


def score(folder: Path | str, **protocol: Any) -> dict[str, Any]:
    """The table of scores of a run's folder or of one subject, which `dbtrain evaluate --json` prints.

    protocol: fields of `dbtrain.evaluate.protocol.Protocol`: protocol, identity, clip, images, distance ...
    """
    from dbtrain.evaluate.protocol import Protocol
    from dbtrain.evaluate.summary import evaluate

    if unknown := protocol.keys() - {field.name for field in fields(Protocol)}:
        raise ConfigError(f"score: has no {', '.join(sorted(unknown))}; see dbtrain.evaluate.protocol.Protocol")
    return evaluate(Path(folder), Protocol(**protocol))


@contextmanager
def _alone() -> Iterator[None]:
    """A process has one process group, and so one training at a time."""
    if not _one_at_a_time.acquire(blocking=False):
        raise EngineError("another training of this process is under way; wait for it, or start another process")
    try:
        yield
    finally:
        _one_at_a_time.release()


def _written(rows: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """The manifest of some rows, written into the output folder; paths are anchored at the current folder."""

    def anchor(images: Any) -> Any:
        if isinstance(images, str | Path):
            return str(Path(images).expanduser().absolute())
        return [anchor(image) for image in images]

    places = ("images", "mask")
    lines = [{key: anchor(value) if key in places else value for key, value in row.items()} for row in rows]
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / ROWS, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    return out / ROWS
